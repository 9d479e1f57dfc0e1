"""Who works on a run: claim files in its folder, which machines that share the folder respect.

The claims of a run are ``claim-0``, ``claim-1``, ...; the one with the highest number holds. Each is created with
O_EXCL, so that of several runners that want the next number one gets it, and none is ever removed or written by
another: there is no moment in which a slow runner could remove the claim of a quick one. A holder touches its claim
every few seconds. A claim is given up when its holder says so in it, when its holder's process on this machine has
ended, or when it was not touched for :data:`STALE_SECONDS`, by the clock of the file system that holds them all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from study.process import end_leftover, is_same_process, started_at
from study.rows import write_durably

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""More than what a run whose runner died may take to end (``process.SECONDS_TO_END``)."""
_REMOVED = ".removed-"
_CLAIM = re.compile(r"claim-(\d+)")


class Lease:
    """The right to work on a run, until :meth:`beat` says that it is lost.

    Args:
        path: the claim.
        number: its number.
        content: what it says.

    Attributes:
        finished_before: whether the last holder had finished the run, row and all, and left the folder.
    """

    def __init__(self, path: Path, number: int, content: dict[str, Any]) -> None:
        self._path, self._number, self._content = path, number, content
        self.finished_before = False

    def beat(self) -> bool:
        """Touches the claim; False if another runner has taken over."""
        try:
            os.utime(self._path)
        except FileNotFoundError:
            return False
        except OSError:  # a shared folder that is out of reach for a moment
            return True
        return self._is_highest()

    def note_process(self, pid: int) -> None:
        """Writes down which process works on the run."""
        self._write(process=pid, process_began=started_at(pid))

    def release(self, finished: bool = False) -> None:
        """Gives the run up, for whoever wants it; ``finished`` says that its row is written."""
        with contextlib.suppress(OSError):
            if self._path.exists():
                self._write(released=True, finished=finished)

    def remove_work(self) -> None:
        """Removes the folder of the run, which is finished."""
        folder = self._path.parent
        removed = folder.with_name(f"{_REMOVED}{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def _is_highest(self) -> bool:
        claims = _claims(self._path.parent)
        return bool(claims) and claims[-1][0] == self._number

    def _write(self, **changes: Any) -> None:
        self._content |= changes
        write_durably(self._path, json.dumps(self._content) + "\n")


def take(work: Path, stale_seconds: float = STALE_SECONDS) -> Lease | None:
    """The lease of the run with this folder, which is created; None if somebody else has it.

    What is left of the processes of a holder that died on this machine has ended when this returns.
    """
    work.mkdir(parents=True, exist_ok=True)
    claims = _claims(work)
    before: dict[str, Any] = {}
    number = 0
    if claims:
        number, path = claims[-1][0] + 1, claims[-1][1]
        before = _read(path)
        if not _is_given_up(path, before, stale_seconds):
            return None
    lease = _create(work, number)
    died_here = before.get("machine") == machine() and not before.get("released")
    if lease is not None and died_here and before.get("process_began") is not None:
        end_leftover(before["process"], before["process_began"])
    if lease is not None:
        lease.finished_before = bool(before.get("finished"))
    return lease


def remove_abandoned(work: Path, stale_seconds: float = STALE_SECONDS) -> None:
    """Removes the folder of a finished run whose runner was killed before it did; one that was released was kept."""
    claims = _claims(work)
    if not claims or _read(claims[-1][1]).get("released"):
        return
    lease = take(work, stale_seconds)
    if lease is not None:
        lease.remove_work()


def remove_leftovers(works: Path) -> None:
    """Removes what a runner that was killed had begun to remove."""
    for path in works.glob(f"{_REMOVED}*"):
        shutil.rmtree(path, ignore_errors=True)


def clear(work: Path) -> None:
    """Removes what lies in the folder of a run, but the claims."""
    for path in work.iterdir():
        if _CLAIM.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def clock(folder: Path) -> float:
    """The time by the clock of the file system that holds ``folder``, in seconds."""
    os.utime(folder)
    return folder.stat().st_mtime


def machine() -> str:
    """What tells this machine, or container, from others, and from itself before it was started again."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _create(work: Path, number: int) -> Lease | None:
    """The claim with this number; None if another runner was quicker."""
    path = work / f"claim-{number}"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except (FileExistsError, FileNotFoundError):  # or the folder went: the run is finished
        return None
    content = {
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "began": started_at(os.getpid()),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
    lease = Lease(path, number, content)
    return lease if lease.beat() else None


def _is_given_up(path: Path, content: dict[str, Any], stale_seconds: float) -> bool:
    if content.get("released"):
        return True
    here = content.get("machine") == machine() and content.get("began") is not None
    if here and not is_same_process(content["pid"], content["began"]):
        return True
    try:
        return clock(path.parent) - path.stat().st_mtime > stale_seconds
    except FileNotFoundError:
        return False


def _claims(work: Path) -> list[tuple[int, Path]]:
    """(number, file) of the claims, the holder's last."""
    try:
        found = [(int(match[1]), path) for path in work.iterdir() if (match := _CLAIM.fullmatch(path.name))]
    except FileNotFoundError:
        return []
    return sorted(found)


def _read(path: Path) -> dict[str, Any]:
    """What a claim says; nothing if it is being written, or its runner was killed before it wrote it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
