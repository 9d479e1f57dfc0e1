"""Runs one command for a runner and ends it, with everything it started, when the runner says so or dies.

    python supervise.py SECONDS COMMAND...

Standard input is a pipe from the runner. The command starts when a byte comes; when the pipe closes, because the
runner closed it or was killed, the command's process group gets SIGTERM and after so many seconds SIGKILL. The exit
status is the command's. It needs the standard library only, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

NEVER_STARTED = 143
_POLL_SECONDS = 0.05
_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>


def main(argv: Sequence[str]) -> int:
    """Runs ``argv[1:]`` and gives it ``argv[0]`` seconds to end."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the runner gets them too, and says what to do
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the command would inherit
    if not os.read(0, 1):
        return NEVER_STARTED
    _adopt_orphans()
    child = subprocess.Popen(argv[1:], stdin=subprocess.DEVNULL, process_group=0)
    status = _supervise(child.pid, float(argv[0]))
    child.returncode = status  # it has been waited for
    return status


def _supervise(group: int, patience: float) -> int:
    """Waits until no process of the group is left; returns the status of its first one."""
    status: int | None = None
    asked: float | None = None
    while True:
        for pid, code in _reaped():
            if pid == group:
                status = code
        if not _is_alive(group):
            return 1 if status is None else status
        if asked is None and (status is not None or _runner_gone()):
            asked = time.monotonic()
            _signal(group, signal.SIGTERM)
        elif asked is not None and time.monotonic() - asked > patience:
            _signal(group, signal.SIGKILL)
            if time.monotonic() - asked > patience + 5.0:
                return 1 if status is None else status
        time.sleep(_POLL_SECONDS)


def _adopt_orphans() -> None:
    """Makes this process the parent of orphans below it, so that it can wait for them; on Linux."""
    try:
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (OSError, AttributeError):
        return


def _reaped() -> list[tuple[int, int]]:
    """(process, exit status) of every child that ended; killed by signal n is 128 + n, as a shell has it."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, word = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        code = os.waitstatus_to_exitcode(word)
        ended.append((pid, code if code >= 0 else 128 - code))


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _runner_gone() -> bool:
    ready, _, _ = select.select([0], [], [], 0)
    return bool(ready) and not os.read(0, 1)


def _signal(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
