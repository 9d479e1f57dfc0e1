"""Runs that SIGKILL ends at random moments and that go on: they end with the bits of a run that nobody killed.

Two trials in processes forked from one that has imported everything, and one with two processes of which one is
killed; ``make test-faults`` has twenty (FAULT_TRIALS), each process a fresh interpreter (FAULT_FRESH), most of whose
time goes into imports, and four with two processes. The moments are drawn from a
generator of fixed seed, so that the plan is the same every time; where they strike depends on the machine. Every other
trial is aimed at a write of a checkpoint.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from faults import SEED, Child, Trials, wait_for
from interrupted import HARD_TO_RESUME, words
from tiny import sentences, write_rows

TRIALS = int(os.environ.get("FAULT_TRIALS", "2"))
TRIALS_TOGETHER = max(1, TRIALS // 5)
FRESH = "FAULT_FRESH" in os.environ
EPOCHS = 2 if TRIALS == 2 else 3
STEPS_PER_EPOCH = 12


@pytest.fixture
def long(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run on 45 sentences: noise, dropout, two batches of two to a step but one at the end of an epoch."""
    train_file = write_rows(tmp_path / "train.tsv", sentences(45))
    return {
        **settings,
        **HARD_TO_RESUME,
        "train_file": train_file,
        "per_device_train_batch_size": 2,
        "num_train_epochs": EPOCHS,
        "eval_steps": 7,
        "logging_steps": 5,
        "checkpointing_steps": 2,
    }


@pytest.mark.slow
def test_killed_runs_end_with_the_bits_of_the_one_that_was_not(
    long: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = Trials(long, tmp_path, FRESH)
    assert trials.expected["steps"] == EPOCHS * STEPS_PER_EPOCH
    kills = []
    for number in range(TRIALS):
        kills += (these := trials.run(number))
        with capsys.disabled():
            print(f"trial {number + 1} of {TRIALS}: killed {'; '.join(map(str, these))}: identical", flush=True)
    writing = sum(kill.writing for kill in kills)
    with capsys.disabled():
        print(f"seed {SEED}: {TRIALS} of {TRIALS} trials identical; {writing} of {len(kills)} kills hit a write")
    assert any(not kill.finished for kill in kills)
    assert TRIALS < 10 or writing >= TRIALS // 4, "too few kills hit a write to say anything about writes"


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_both_go_on_to_the_same_bits(
    long: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other one ends soon, too."""
    trials = Trials({**long, "num_train_epochs": 2}, tmp_path, FRESH, processes=2)
    assert (trials.expected["num_processes"], trials.expected["steps"]) == (2, 12)
    for number in range(TRIALS_TOGETHER):
        kills = trials.run(number)
        with capsys.disabled():
            print(f"two processes, trial {number + 1}: killed {'; '.join(map(str, kills))}: identical", flush=True)
        assert number > 0 or not kills[0].finished


def test_sigterm_to_a_process_saves_and_gives_its_own_status(long: dict[str, Any], tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "stopped"
    line = words({**long, "output_dir": str(folder), "checkpointing_steps": "null"})
    child = Child([*line, "--num_train_epochs=1000"], log, FRESH)
    wait_for(folder / "config.yaml", child)
    child.send(signal.SIGTERM)
    assert child.wait() == 75, log.read_text()
    assert "stopped by SIGTERM after step" in log.read_text()
    assert [path.name.partition("-")[0] for path in sorted(folder.iterdir())] == ["checkpoint", "config.yaml"]
