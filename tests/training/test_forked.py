"""The helper that runs a function in processes of its own: what fails is seen, and none is left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from forked import Forked, run_in_two


def greet(name: str) -> None:
    print(f"{name} {os.environ['RANK']} of {os.environ['WORLD_SIZE']}", flush=True)


def fail(rank: str) -> None:
    """One fails, the other would go on."""
    if os.environ["RANK"] == rank:
        raise ValueError(f"rank {rank} has had enough")
    time.sleep(600)


def test_both_run_and_what_they_print_is_kept(tmp_path: Path) -> None:
    run_in_two(greet, "process", log=tmp_path / "log")
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["process 0 of 2", "process 1 of 2"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_where_one_fails_the_other_ends_and_the_test_fails(tmp_path: Path, rank: str) -> None:
    begun = time.monotonic()
    with pytest.raises(AssertionError, match=f"rank {rank} has had enough"):
        run_in_two(fail, rank, log=tmp_path / "log")
    assert time.monotonic() - begun < 300


def test_what_does_not_end_is_killed(tmp_path: Path) -> None:
    sleeping = Forked(time.sleep, 600, log=tmp_path / "log", processes=2)
    with pytest.raises(TimeoutError, match="2 of 2 processes do not end"):
        sleeping.wait(0.5)
    deadline = time.monotonic() + 60
    while sleeping.running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not sleeping.running()
