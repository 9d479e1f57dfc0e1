"""Runs of finetune.py in processes of their own, killed at random moments and started again."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from interrupted import outcome, words

import finetune
from forked import Forked
from harness.checkpoints import UNFINISHED, find_checkpoints
from harness.results import CONFIG_FILE, RESULTS_FILE

SEED = 6
"""Of the random moments."""
_PATIENCE = 300.0
_SECONDS_TO_END = 60.0
"""Torchrun sends SIGTERM to the processes that are left, and after 30 seconds SIGKILL."""


class Child:
    """One process that runs finetune.py, or several that run it together.

    Args:
        line: its command line.
        log: gets what it prints.
        fresh: fresh interpreters, of which torchrun's agent starts several; else forks (:class:`forked.Forked`).
        processes: how many.
    """

    def __init__(self, line: Sequence[str], log: Path, fresh: bool, processes: int = 1) -> None:
        self._together = processes > 1
        if fresh:
            agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command = [sys.executable, *(agent if self._together else ()), finetune.__file__, *line]
            with log.open("ab") as output:
                self._popen = subprocess.Popen(command, stdout=output, stderr=output)
        else:
            self._forked = Forked(finetune.main, list(line), log=log, processes=processes)
        self._fresh = fresh

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._popen.poll() is None if self._fresh else self._forked.running()

    def send(self, number: signal.Signals, which: int = 0) -> None:
        """Sends one of the processes a signal, if it has not ended."""
        if not self._fresh:
            self._forked.send(number, which)
        elif self.running():
            workers = _workers(self._popen.pid) if self._together else [self._popen.pid]
            if len(workers) > which:  # else the run is at its end
                os.kill(workers[which], number)

    def kill_one(self, which: int) -> None:
        """Kills one of the processes; the others must end soon.

        Raises:
            TimeoutError: not all have ended.
        """
        workers = _workers(self._popen.pid) if self._fresh and self._together else []
        self.send(signal.SIGKILL, which)
        try:
            self.wait(_SECONDS_TO_END)
        finally:
            left = [pid for pid in workers if _parent(pid) is not None]
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if left:
            raise TimeoutError("torchrun has ended, but not all of its processes")

    def wait(self, seconds: float = _PATIENCE) -> int:
        """The exit status.

        Raises:
            TimeoutError: it has not ended after so many seconds; it is killed.
        """
        if not self._fresh:
            return self._forked.wait(seconds)
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired as error:
            self._popen.kill()
            raise TimeoutError("the run does not end") from error


@dataclasses.dataclass(frozen=True)
class Kill:
    """When a process was killed.

    Attributes:
        aimed: at a write of a checkpoint, or else at any moment of training.
        found: the checkpoint that was there, if any.
        writing: a checkpoint was half written.
        finished: the run had ended before.
    """

    aimed: bool
    found: str | None
    writing: bool
    finished: bool

    def __str__(self) -> str:
        if self.finished:
            return "after the end"
        during = "while writing a checkpoint" if self.writing else "between two writes"
        return f"{during}{' (aimed)' if self.aimed else ''}, latest {self.found or 'none'}"


class Trials:
    """Kill-and-resume trials of one set of settings against the run that nobody killed.

    Args:
        settings: of the run; it writes checkpoints.
        base: folder for all runs.
        fresh: as for :class:`Child`.
        processes: as for :class:`Child`; one of them is killed.
    """

    def __init__(self, settings: dict[str, Any], base: Path, fresh: bool, processes: int = 1) -> None:
        self.settings, self.base, self.fresh, self.processes = settings, base, fresh, processes
        self.random = random.Random(SEED)
        whole = base / "whole"
        child = self._start(whole, checkpointing_steps="null")
        wait_for(whole / CONFIG_FILE, child)
        begun = time.perf_counter()
        wait_for(whole / RESULTS_FILE, child)
        self.seconds = time.perf_counter() - begun
        status = child.wait()
        assert status == 0, (whole.with_suffix(".log")).read_text()
        self.expected = outcome(whole)

    def run(self, number: int) -> list[Kill]:
        """One trial: kills once or twice, goes on, and compares; returns the kills."""
        folder = self.base / f"trial-{number}"
        kills = [self._kill(folder, aimed=number % 2 == 1) for _ in range(self.random.choice((1, 2)))]
        status = self._start(folder).wait()
        assert status == 0, folder.with_suffix(".log").read_text()
        assert outcome(folder) == self.expected, f"trial {number}, killed {'; '.join(map(str, kills))}"
        assert not list(folder.glob(f"*{UNFINISHED}"))
        return kills

    def _kill(self, folder: Path, aimed: bool) -> Kill:
        """Starts or goes on, and kills at a random moment of training or of the next writes of a checkpoint."""
        child = self._start(folder)
        wait_for(folder / CONFIG_FILE, child)
        moment = time.perf_counter() + self.random.uniform(0.0, self.seconds)
        writes, pause = self.random.randint(1, 6), self.random.uniform(0.0, 0.02)
        seen: set[Path] = set()
        while child.running() and (aimed or time.perf_counter() < moment):
            time.sleep(0.002)
            seen |= set(folder.glob(f"*{UNFINISHED}"))
            if aimed and len(seen) >= writes:
                time.sleep(pause)
                break
        child.kill_one(self.random.randrange(self.processes))
        found = find_checkpoints(folder)
        return Kill(
            aimed,
            found[0].name if found else None,
            writing=bool(list(folder.glob(f"*{UNFINISHED}"))),
            finished=(folder / RESULTS_FILE).exists(),
        )

    def _start(self, folder: Path, **changes: Any) -> Child:
        settings = {**self.settings, "output_dir": str(folder), "resume_from_checkpoint": "latest", **changes}
        return Child(words(settings), folder.with_suffix(".log"), self.fresh, self.processes)


def wait_for(path: Path, child: Child) -> None:
    """Waits until there is such a file, or the process ends."""
    while child.running() and not path.exists():
        time.sleep(0.002)


def _workers(agent: int) -> list[int]:
    """The processes that run finetune.py for an agent, in the order of their start."""
    running = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return sorted(pid for pid in running if _parent(pid) == agent and _runs_finetune(pid))


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return None


def _runs_finetune(pid: int) -> bool:
    try:
        return finetune.__file__.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
