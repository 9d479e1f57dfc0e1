"""Studies whose runs do next to nothing: how to write them down, start them, and what their scripts leave."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import ablate
from harness.results import write_results
from study import execute
from study.plan import PlannedRun

STUDY: dict[str, Any] = {
    "base": {"train_file": "a.tsv", "validation_file": "b.tsv", "tau": 2.0},
    "arms": {"soft": {"noise": "gumbel"}, "plain": {"noise": "none"}},
    "seeds": [0, 1],
}
FAKE_SCRIPT = Path(__file__).with_name("fake_script.py")
VERSIONS = {"python": "3.11", "torch": "2.13", "gumbel_attention": "0.1"}


def write_study(folder: Path, **changes: Any) -> str:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "output_dir": str(folder / "out"), **changes}, sort_keys=False))
    return str(path)


def results_of(settings: dict[str, Any], value: float = 0.5) -> dict[str, Any]:
    """What a run of these settings may have measured."""
    final = {mode: {"accuracy": value, "loss": 1.0} for mode in ("noise_off", "noise_on")}
    return {
        "started": "2026-01-01T00:00:00+00:00",
        "config": settings,
        "final": final,
        "series": {"train": [], "evaluation": []},
        "train_seconds": 2.0,
        "eval_seconds": 1.0,
        "device": "cpu (fake)",
        "versions": VERSIONS,
        "git": {"commit": "c" * 40, "dirty": False},
    }


def row_of(arm: str, seed: int, **changes: Any) -> dict[str, Any]:
    """The content of a row."""
    identity = {"id": f"{arm}-seed{seed}-00000000", "study": "s", "arm": arm, "seed": seed}
    identity |= {"script": "finetune", "command": "accelerate launch"}
    return {**identity, "schema_version": 1, "status": "finished", **results_of({"seed": seed}), **changes}


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        (folder / f"{row['id']}.json").write_text(json.dumps(row))


class StubProcess:
    """A script that has ended when it begins."""

    def __init__(self, starter: StubStarter, settings: dict[str, Any], log: Path) -> None:
        self._starter, self._settings, self._log = starter, settings, log
        self.pid, self.status = os.getpid(), None

    def begin(self) -> None:
        folder = Path(self._settings["output_dir"])
        self._starter.started.append(folder.name)
        self._log.write_text("starting\nValueError: the reason\n")
        self.status: int | None = 0
        if self._starter.fails(self._settings, folder.name):
            self.status = 1
        elif not self._starter.silent:
            write_results(folder, results_of(self._settings, self._starter.value(self._settings)))

    def poll(self) -> int | None:
        return self.status

    def stop(self) -> None:
        pass

    def join(self) -> None:
        self.stop()


class StubStarter:
    """Stands in for the launched scripts; may fail for one arm."""

    def __init__(
        self,
        fail: str = "",
        silent: bool = False,
        value: Callable[[dict[str, Any]], float] = lambda settings: 0.5 + 0.1 * settings["seed"],
        fails: Callable[[dict[str, Any]], bool] = lambda settings: False,
    ) -> None:
        self.silent, self.value = silent, value
        self.fails = lambda settings, name: bool(fail and name.startswith(fail)) or fails(settings)
        self.started: list[str] = []

    def __call__(self, command: Sequence[str], log: Path) -> StubProcess:
        path = Path(command[command.index("--config") + 1])
        return StubProcess(self, yaml.safe_load(path.read_text()), log)


def use_fake_scripts(monkeypatch: pytest.MonkeyPatch, folder: Path, seconds: float = 0.2) -> Path:
    """Has every run be one of fake_script.py; returns the folder in which these report."""
    reports = folder / "reports"
    reports.mkdir()

    def command(run: PlannedRun, threads: int) -> list[str]:
        script = [sys.executable, "-I", "-S", str(FAKE_SCRIPT), str(reports), str(seconds)]
        return [*script, "--config", str(run.work / "arguments.yaml")]

    monkeypatch.setattr(execute, "launch_command", command)
    return reports


@contextlib.contextmanager
def forked(action: Callable[[], int], output: Path) -> Iterator[int]:
    """A process that does ``action``, ends with its status, and writes to a file; yields its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; these wait for work
        pid = os.fork()
    if pid == 0:
        status = 70
        try:
            descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
            status = action()
            sys.stdout.flush()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def runner(*argv: str) -> Callable[[], int]:
    return lambda: ablate.main(list(argv))


def status_of(pid: int) -> int:
    """Waits for a forked process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def rows_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Id -> content of the finished runs."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))}
