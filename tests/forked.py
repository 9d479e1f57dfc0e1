"""Processes forked from a server that has imported the training scripts, which saves the seconds of the imports.

The server is one for each pytest process. It imports and does nothing more: no thread of torch runs in it when it
forks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

_SECONDS_TO_END = 30.0
"""After SIGTERM; torchrun waits as long."""


class Forked:
    """Processes that run a function: one, or several that Accelerate takes for one launch, as torchrun starts them.

    Where one of several fails or is killed, the others get SIGTERM.

    Args:
        function: of a module that the processes can import.
        *args: its arguments.
        log: gets what they print.
        processes: how many.
    """

    def __init__(self, function: Callable[..., object], *args: Any, log: Path, processes: int = 1) -> None:
        os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # of the server
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["finetune", "transduction", "language_model"])
        environments = [dict(os.environ)] if processes == 1 else _environments(processes)
        self._processes = [
            context.Process(target=_run, args=(function, args, str(log), environment)) for environment in environments
        ]
        for process in self._processes:
            process.start()

    def running(self) -> bool:
        """Whether one has not ended."""
        return any(process.is_alive() for process in self._processes)

    def send(self, number: signal.Signals, which: int = 0) -> None:
        """Sends one of them a signal, if it has not ended."""
        if self._processes[which].is_alive():
            os.kill(self._processes[which].pid, number)

    def wait(self, seconds: float) -> int:
        """The exit status of one that failed (negative: killed by that signal), or 0.

        Raises:
            TimeoutError: one has not ended after so many seconds, or some seconds after another one had failed.
        """
        status, until = 0, time.monotonic() + seconds
        while left := [process for process in self._processes if process.is_alive()]:
            connection.wait([process.sentinel for process in left], max(0.0, until - time.monotonic()))
            if not status and (status := self._failure()):
                until = time.monotonic() + _SECONDS_TO_END
                for process in left:
                    process.terminate()
            elif time.monotonic() >= until:
                for process in left:
                    process.kill()
                raise TimeoutError(f"{len(left)} of {len(self._processes)} processes do not end")
        return status or self._failure()

    def _failure(self) -> int:
        return next((process.exitcode for process in self._processes if process.exitcode), 0)


def run_in_two(function: Callable[..., object], *args: Any, log: Path, seconds: float = 300.0) -> None:
    """Runs a function in two processes that Accelerate takes for one launch; they must end well."""
    assert Forked(function, *args, log=log, processes=2).wait(seconds) == 0, log.read_text()


def _environments(processes: int) -> list[dict[str, str]]:
    """The variables of each process of one launch on this machine, as torchrun sets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [{**os.environ, **launch, **sizes, **rank} for rank in ranks]


def _run(function: Callable[..., object], args: tuple[Any, ...], log: str, environment: Mapping[str, str]) -> None:
    """What a forked process does."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)
