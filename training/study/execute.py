"""Runs the runs of a study, each in a process of its own: several at a time, several runners in one folder."""

from __future__ import annotations

import dataclasses
import json
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from harness.checkpoints import find_checkpoints
from harness.results import RESULTS_FILE, read_results
from study import lease as leases
from study.checks import OWN_KEYS
from study.lease import HEARTBEAT_SECONDS, STALE_SECONDS, Lease
from study.plan import WORK_FOLDER, PlannedRun
from study.process import Process, Starter, SupervisedProcess, launch_command, portable_command, threads_per_run
from study.progress import Progress, duration
from study.rows import is_row, write_durably, write_row

ARGUMENTS_FILE = "arguments.yaml"
LOG_FILE = "log.txt"
_POLL_SECONDS = 0.1
_LOOK_AGAIN_SECONDS = 5.0
_LINES_KEPT = 20


class Interrupted(BaseException):
    """The runner was told to stop."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How runs are run.

    Attributes:
        jobs: how many at a time.
        keep_work: leave the folders of finished runs.
        start: starts a command.
        tell: prints a line.
        stopped: why to stop; None while there is no reason.
        stale_seconds: after so long without a touch the claim of another runner counts as given up.
    """

    jobs: int = 1
    keep_work: bool = False
    start: Starter = SupervisedProcess
    tell: Callable[[str], object] = print
    stopped: Callable[[], str | None] = lambda: None
    stale_seconds: float = STALE_SECONDS


@dataclasses.dataclass
class _Active:
    """A run that this runner works on."""

    run: PlannedRun
    lease: Lease
    process: Process
    began: float


def run_all(
    runs: Sequence[PlannedRun],
    title: str,
    progress: Progress,
    options: Options,
) -> dict[str, str]:
    """Runs those of ``runs`` that are not finished; returns when every one has finished or failed, here or elsewhere.

    A run that failed in another runner after this one began is not tried again here.

    Args:
        runs: the runs, in the order in which they are begun.
        title: of the study.
        progress: is told of every run that is finished.
        options: how.

    Returns:
        The message of every failed run by id.

    Raises:
        Interrupted: ``options.stopped`` gave a reason; all processes have ended.
    """
    if not runs:
        return {}
    executor = _Executor(runs, title, progress, options)
    try:
        return executor.run_all()
    finally:
        executor.stop_all()


class _Executor:
    """The loop around the processes.

    It is one thread: a run is begun, watched and finished between two looks at the others.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        title: str,
        progress: Progress,
        options: Options,
    ) -> None:
        self._title, self._progress, self._options = title, progress, options
        self._waiting: dict[str, tuple[float, PlannedRun]] = {run.id: (0.0, run) for run in runs}
        self._active: list[_Active] = []
        self._failures: dict[str, str] = {}
        self._threads = threads_per_run(options.jobs)
        self._last_beat = time.monotonic()
        self._told_of_others = False
        works = runs[0].output_dir / WORK_FOLDER
        works.mkdir(parents=True, exist_ok=True)
        leases.remove_leftovers(works)
        self._began = leases.clock(works)

    def run_all(self) -> dict[str, str]:
        while self._waiting or self._active:
            reason = self._options.stopped()
            if reason is not None:
                raise Interrupted(reason)
            self._begin_some()
            self._beat()
            if not self._collect() and (self._active or self._waiting):
                self._tell_of_others()
                time.sleep(_POLL_SECONDS)
        return self._failures

    def stop_all(self) -> None:
        """Ends what still runs and gives it up."""
        for active in self._active:
            active.process.stop()
        for active in self._active:
            active.process.join()
            active.lease.release()
        self._active = []

    def _begin_some(self) -> None:
        for name, (not_before, run) in list(self._waiting.items()):
            if len(self._active) >= self._options.jobs or self._options.stopped() is not None:
                return
            if time.monotonic() < not_before:
                continue
            if self._is_settled(run):
                del self._waiting[name]
                continue
            lease = leases.take(run.work, self._options.stale_seconds)
            if lease is None:
                self._waiting[name] = (time.monotonic() + _LOOK_AGAIN_SECONDS, run)
                continue
            del self._waiting[name]
            self._begin(run, lease)

    def _is_settled(self, run: PlannedRun) -> bool:
        """Whether the run is finished, or failed in another runner since this one began."""
        if is_row(run.row):
            if not self._options.keep_work:
                leases.remove_abandoned(run.work, self._options.stale_seconds)
            self._progress.note_finished(run)
            return True
        message = _failure_since(run.failure, self._began)
        if message is not None:
            self._failures[run.id] = f"elsewhere: {message}"
            self._progress.note_failed(run)
        return message is not None

    def _begin(self, run: PlannedRun, lease: Lease) -> None:
        if is_row(run.row):  # finished between the look at its row and the claim
            self._progress.note_finished(run)
            lease.remove_work()
            return
        process = None
        try:
            if lease.finished_before:  # and its row was removed: it is to run again
                leases.clear(run.work)
            if _prepare(run):
                self._finish(run, lease, None)
                return
            process = self._options.start(launch_command(run, self._threads), run.work / LOG_FILE)
            lease.note_process(process.pid)
            process.begin()
        except OSError as error:
            if process is not None:
                process.join()
            self._fail(run, lease, None, f"could not be started: {error}")
            return
        self._active.append(_Active(run, lease, process, time.monotonic()))
        self._progress.note_begun(run)
        self._options.tell(f"{self._progress.count()} {run.label}: running")

    def _beat(self) -> None:
        """Touches the claims; ends the runs that another runner has taken over."""
        if time.monotonic() - self._last_beat < min(HEARTBEAT_SECONDS, self._options.stale_seconds / 4):
            return
        self._last_beat = time.monotonic()
        for active in list(self._active):
            if not active.lease.beat():
                self._lose(active)

    def _lose(self, active: _Active) -> None:
        self._options.tell(f"{active.run.label}: another runner has taken over, ends it here")
        active.process.join()
        self._active.remove(active)
        self._progress.note_stopped(active.run)
        self._waiting[active.run.id] = (time.monotonic() + _LOOK_AGAIN_SECONDS, active.run)

    def _collect(self) -> bool:
        """Finishes the runs whose processes have ended; whether there were any."""
        ended = [(active, status) for active in self._active if (status := active.process.poll()) is not None]
        for active, status in ended:
            if not active.lease.beat():
                self._lose(active)
                continue
            self._active.remove(active)
            seconds = time.monotonic() - active.began
            if status != 0:
                self._fail(active.run, active.lease, status, f"exit status {status}")
            elif read_results(active.run.work) is None:
                self._fail(active.run, active.lease, status, f"exit status 0 but no {RESULTS_FILE}")
            else:
                self._finish(active.run, active.lease, seconds)
        return bool(ended)

    def _finish(self, run: PlannedRun, lease: Lease, seconds: float | None) -> None:
        results = read_results(run.work)
        assert results is not None
        try:
            write_row(run.row, row_content(run, self._title, results, self._threads, seconds))
        except (OSError, ValueError) as error:
            self._fail(run, lease, 0, f"its row could not be written: {error}")
            return
        run.failure.unlink(missing_ok=True)
        if self._options.keep_work:
            lease.release(finished=True)
        else:
            lease.remove_work()
        self._progress.note_finished(run)
        took = "done" if seconds is None else f"done in {duration(seconds)}"
        self._options.tell(f"{self._progress.count()} {run.label}: {took}{self._progress.left(self._options.jobs)}")

    def _fail(self, run: PlannedRun, lease: Lease, status: int | None, reason: str) -> None:
        log = run.work / LOG_FILE
        lines = _last_lines(log)
        message = f"{reason}, log in {log}: {lines[-1].strip() if lines else '(the log is empty)'}"
        content = {
            "id": run.id,
            "arm": run.arm,
            "seed": run.seed,
            "reason": reason,
            "message": message,
            "exit_status": status,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "log": lines,
        }
        try:
            write_durably(run.failure, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            message += f" ({run.failure} could not be written: {error})"
        self._failures[run.id] = message
        lease.release()
        self._progress.note_failed(run)
        self._options.tell(f"{self._progress.count()} {run.label}: FAILED: {message}")

    def _tell_of_others(self) -> None:
        if self._active or self._told_of_others:
            return
        self._told_of_others = True
        self._options.tell(f"{len(self._waiting)} runs are claimed by other runners: waits for them")


def row_content(
    run: PlannedRun, title: str, results: dict[str, Any], threads: int, seconds: float | None
) -> dict[str, Any]:
    """What the row of a finished run holds.

    Args:
        run: the run.
        title: of its study.
        results: the content of its results.json.
        threads: its share of the processor.
        seconds: from its start to its end; None if it was not watched.
    """
    in_one_go = seconds is not None and not results.get("resumed_at_steps")
    config = {key: value for key, value in results.get("config", {}).items() if key == "seed" or key not in OWN_KEYS}
    return {
        "id": run.id,
        "study": title,
        "arm": run.arm,
        "seed": run.seed,
        "script": run.script,
        "command": shlex.join(portable_command(run, threads)),
        **results,
        "config": config,
        "wall_seconds": seconds if in_one_go else None,
    }


def _prepare(run: PlannedRun) -> bool:
    """Makes the run's folder ready; whether the run is finished already, and only its row was not written."""
    settings = {**run.args.to_dict(), "output_dir": str(run.work), "resume_from_checkpoint": "latest"}
    text = yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False)
    arguments = run.work / ARGUMENTS_FILE
    if arguments.exists() and arguments.read_text(encoding="utf-8") == text and read_results(run.work) is not None:
        return True
    if not find_checkpoints(run.work):
        leases.clear(run.work)
    write_durably(arguments, text)
    return False


def _failure_since(path: Path, moment: float) -> str | None:
    """What a failure says that was written after the moment; None if there is none."""
    try:
        if path.stat().st_mtime < moment:
            return None
        return str(json.loads(path.read_text(encoding="utf-8"))["message"])
    except (OSError, ValueError, KeyError):
        return None


def _last_lines(log: Path) -> list[str]:
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-_LINES_KEPT:]
