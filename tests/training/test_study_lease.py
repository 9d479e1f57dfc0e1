"""Claims of runs: one holder at a time, whoever dies and whenever."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from studies import forked, status_of, wait_until

from study import lease as leases


def test_one_takes_and_the_next_waits_until_it_is_given_up(tmp_path: Path) -> None:
    work = tmp_path / "work" / "a"
    first = leases.take(work)
    assert first is not None
    assert first.beat()
    assert leases.take(work) is None
    first.release()
    second = leases.take(work)
    assert second is not None
    assert not first.beat()
    assert second.beat()
    assert leases.take(work) is None
    content = json.loads((work / "claim-1").read_text())
    assert (content["pid"], content["machine"]) == (os.getpid(), leases.machine())
    second.remove_work()
    assert os.listdir(tmp_path / "work") == []
    assert not second.beat()
    second.release()
    assert os.listdir(tmp_path / "work") == []


def test_a_claim_that_is_not_touched_is_taken_over(tmp_path: Path) -> None:
    first = leases.take(tmp_path)
    assert first is not None
    for age, expected in ((leases.STALE_SECONDS - 10, None), (leases.STALE_SECONDS + 1, "taken")):
        past = leases.clock(tmp_path) - age
        os.utime(tmp_path / "claim-0", (past, past))
        assert (leases.take(tmp_path) is None) is (expected is None)
    assert not first.beat()


def test_beating_keeps_a_claim_fresh(tmp_path: Path) -> None:
    first = leases.take(tmp_path)
    assert first is not None
    past = leases.clock(tmp_path) - leases.STALE_SECONDS - 1
    os.utime(tmp_path / "claim-0", (past, past))
    assert first.beat()
    assert leases.take(tmp_path) is None


def test_the_claim_of_a_process_that_ended_here_is_taken_over_at_once(tmp_path: Path) -> None:
    with forked(lambda: 0 if leases.take(tmp_path) else 1, tmp_path / "log") as pid:
        assert status_of(pid) == 0
    assert leases.take(tmp_path) is not None


def test_the_number_of_a_process_that_ended_may_be_used_again(tmp_path: Path) -> None:
    """This process has the number that the claim names, but began at another time."""
    assert leases.take(tmp_path) is not None
    claim = tmp_path / "claim-0"
    content = json.loads(claim.read_text())
    claim.write_text(json.dumps({**content, "began": content["began"] - 100.0}))
    assert leases.take(tmp_path) is not None


def test_the_claim_of_another_machine_is_not_judged_by_processes_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(leases, "machine", lambda: "another")
        with forked(lambda: 0 if leases.take(tmp_path) else 1, tmp_path / "log") as pid:
            assert status_of(pid) == 0
    assert leases.take(tmp_path) is None


def test_a_claim_that_was_cut_off_counts_by_its_time(tmp_path: Path) -> None:
    (tmp_path / "claim-0").write_text("")
    assert leases.take(tmp_path) is None
    past = leases.clock(tmp_path) - leases.STALE_SECONDS - 1
    os.utime(tmp_path / "claim-0", (past, past))
    assert leases.take(tmp_path) is not None


@pytest.mark.parametrize("left", ["nothing", "released", "dead"])
def test_of_many_takers_one_wins(tmp_path: Path, left: str) -> None:
    """Eight processes that all wait for the same moment, six times over."""
    for trial in range(6):
        work, go = tmp_path / str(trial), tmp_path / f"go-{trial}"
        work.mkdir()
        if left != "nothing":
            with forked(lambda work=work: _take(work, left == "released"), tmp_path / "log") as pid:
                assert status_of(pid) == 0

        def race(work: Path = work, go: Path = go) -> int:
            while not go.exists():
                pass
            outcome = "lost" if leases.take(work) is None else "won"
            (tmp_path / f"{work.name}-{outcome}-{os.getpid()}").touch()
            signal.pause()  # alive until killed, as a runner is
            return 3

        with contextlib.ExitStack() as stack:
            for _ in range(8):
                stack.enter_context(forked(race, tmp_path / "log"))
            go.touch()
            wait_until(lambda trial=trial: len(list(tmp_path.glob(f"{trial}-*"))) == 8)
            assert len(list(tmp_path.glob(f"{trial}-won-*"))) == 1, (tmp_path / "log").read_text()


def _take(work: Path, release: bool) -> int:
    lease = leases.take(work)
    assert lease is not None
    if release:
        lease.release()
    return 0
