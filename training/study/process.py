"""The process of a run: its command, its start, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import psutil
import torch

from study.plan import PlannedRun

SCRIPTS_FOLDER = Path(__file__).parents[1]
SECONDS_TO_END = 30.0
"""What a run that is stopped may take to finish its step and save."""
_SECONDS_TO_DIE = 5.0  # of what is killed


class Process(Protocol):
    """A command that waits for :meth:`begin`."""

    pid: int

    def begin(self) -> None:
        """Lets the command start."""

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""

    def stop(self) -> None:
        """Asks the command and everything it started to end."""

    def join(self) -> None:
        """Returns when they have ended, by force if need be."""


Starter = Callable[[Sequence[str], Path], Process]
"""(command, log file) -> its process."""


class SupervisedProcess:
    """A command below supervise.py: it ends when this process says so, and when this process dies.

    Args:
        command: the command.
        log: the file for its output.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        supervisor = [sys.executable, "-I", "-S", str(Path(__file__).with_name("supervise.py")), str(SECONDS_TO_END)]
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                [*supervisor, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"},
                start_new_session=True,
            )
        self.pid = self._popen.pid

    def begin(self) -> None:
        """Lets the command start."""
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(b"\n")
            self._popen.stdin.flush()

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        status = self._popen.poll()
        if status is not None:
            self.stop()
        return status

    def stop(self) -> None:
        """Asks the command and everything it started to end."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def join(self) -> None:
        """Returns when they have ended, by force if need be."""
        self.stop()
        try:
            self._popen.wait(timeout=SECONDS_TO_END + 10.0)
        except subprocess.TimeoutExpired:
            end_session(self.pid)
            self._popen.wait()


def launch_command(run: PlannedRun, threads: int) -> list[str]:
    """The ``accelerate launch`` of a run: one process, on the GPU if there is one."""
    return [sys.executable, "-m", "accelerate.commands.launch", *_options(run, threads), *_script(run, SCRIPTS_FOLDER)]


def portable_command(run: PlannedRun, threads: int) -> list[str]:
    """The same as a row has it: without the folders of this machine."""
    arguments = f"{run.work.parent.name}/{run.id}/arguments.yaml"
    return ["accelerate", "launch", *_options(run, threads), f"training/{run.script}.py", "--config", arguments]


def threads_per_run(jobs: int) -> int:
    """What OMP_NUM_THREADS says, else the share of each of so many runs in the processor's cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)


def started_at(pid: int) -> float | None:
    """When a process of this machine began, which tells it from a later one of the same number; None if it ended."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def end_leftover(pid: int, began: float) -> None:
    """Waits for what a dead runner left, which ends by itself, and ends it by force if it does not.

    Args:
        pid: of the supervisor.
        began: when that began.
    """
    deadline = time.monotonic() + SECONDS_TO_END
    while _is_same(started_at(pid), began) and time.monotonic() < deadline:
        time.sleep(0.05)
    present = started_at(pid)
    if present is None or _is_same(present, began):
        end_session(pid)


def end_session(session: int) -> None:
    """Kills the processes of a session that :class:`SupervisedProcess` began, and waits until they are gone."""
    killed = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process)
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while any(started_at(process.pid) is not None for process in killed) and time.monotonic() < deadline:
        time.sleep(0.01)


def _is_same(present: float | None, began: float) -> bool:
    return present is not None and abs(present - began) < 2.0


def is_same_process(pid: int, began: float) -> bool:
    """Whether the process that began then still runs on this machine."""
    return _is_same(started_at(pid), began)


def _options(run: PlannedRun, threads: int) -> list[str]:
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", run.args.mixed_precision or "no"]
    options += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", str(threads)]
    return options if torch.cuda.is_available() else [*options, "--cpu"]


def _script(run: PlannedRun, folder: Path) -> list[str]:
    return [str(folder / f"{run.script}.py"), "--config", str(run.work / "arguments.yaml")]
