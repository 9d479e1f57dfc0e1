"""How far a study is, and how long it may still take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from harness.errors import UsageError
from study.plan import PlannedRun
from study.rows import load_row


class Progress:
    """Counts the finished runs of a study and remembers what each took.

    Args:
        runs: all runs that are to be finished, those of the search included.
        now: a clock.
    """

    def __init__(self, runs: Sequence[PlannedRun], now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._open = {run.id: run for run in runs}
        self._total = len(self._open)
        self._finished = 0
        self._seconds: list[tuple[str, float]] = []
        self._begun: dict[str, float] = {}
        for run in runs:
            if run.row.exists():
                self.note_finished(run)

    def note_begun(self, run: PlannedRun) -> None:
        """The run was started here."""
        self._begun[run.id] = self._now()

    def note_stopped(self, run: PlannedRun) -> None:
        """The run was ended here before it was finished."""
        self._begun.pop(run.id, None)

    def note_failed(self, run: PlannedRun) -> None:
        """The run is not to be waited for."""
        self.note_stopped(run)
        self._open.pop(run.id, None)

    def note_finished(self, run: PlannedRun) -> None:
        """The run has a row, written here or elsewhere."""
        self.note_stopped(run)
        if self._open.pop(run.id, None) is None:
            return
        try:
            row = load_row(run.row)
        except UsageError:
            self._open[run.id] = run
            return
        self._finished += 1
        if all(key in row.content for key in ("train_seconds", "eval_seconds")):
            self._seconds.append((row.arm, row.seconds))

    @property
    def finished(self) -> int:
        """How many runs are finished."""
        return self._finished

    @property
    def total(self) -> int:
        """How many there are."""
        return self._total

    def count(self) -> str:
        """Finished runs of all, such as ``[7/40]``."""
        return f"[{self._finished}/{self._total}]"

    def expected_seconds(self, arm: str) -> float | None:
        """The mean of the finished runs of the arm, else of all; None if there is none."""
        own = [seconds for name, seconds in self._seconds if name == arm]
        known = own or [seconds for _, seconds in self._seconds]
        return math.fsum(known) / len(known) if known else None

    def seconds_left(self, jobs: int) -> float | None:
        """What the open runs may still take, so many at a time; None if nothing is known."""
        left = []
        for run in self._open.values():
            expected = self.expected_seconds(run.arm)
            if expected is None:
                return None
            passed = self._now() - self._begun[run.id] if run.id in self._begun else 0.0
            left.append(max(0.0, expected - passed))
        return max(math.fsum(left) / jobs, max(left)) if left else 0.0

    def left(self, jobs: int) -> str:
        """The same in words that follow others; empty if nothing is left or known."""
        seconds = self.seconds_left(jobs)
        return f"; about {duration(seconds)} left" if seconds and self._open else ""


def duration(seconds: float) -> str:
    """Seconds, minutes or hours: ``63 s``, ``31 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
