"""SIGTERM and SIGINT ask a run to stop: it finishes the step, saves and exits."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

STOPPED_STATUS = 75
"""Exit status of a run that was stopped and saved (EX_TEMPFAIL of sysexits.h: to be tried again)."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A signal stopped the run.

    Args:
        name: of the signal.
        step: the last optimiser step.
        checkpoint: what was saved.
    """

    def __init__(self, name: str, step: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by {name} after step {step}, saved in {checkpoint}; "
            "go on with --resume_from_checkpoint latest and the same settings."
        )


class StopSignals:
    """Within this context the first signal is noted in ``received``; a second one ends the process at once.

    Outside the main thread, where Python lets nobody catch signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number).name
        words = f"{self.received}: finishes the step, saves and exits; a second signal exits at once.\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, words.encode())  # print() may be what it interrupts
