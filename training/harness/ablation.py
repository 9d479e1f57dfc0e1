"""An ablation study: arms times seeds, each a run of its own process and folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from harness.arguments import FinetuneArguments, RunArguments
from harness.attention import attention_config
from harness.checkpoints import find_checkpoints
from harness.errors import UsageError
from harness.parsing import check_keys, read_yaml, refuse_unknown
from harness.results import read_results, write_atomically

SCRIPTS_FOLDER = Path(__file__).parents[1]
FINETUNE = "finetune"
LOG_FILE = "log.txt"
_STUDY_KEYS = ("script", "metric", "base", "arms", "seeds", "output_dir")
_OWN_KEYS = ("seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")
_NOT_IN_NAME = (*_OWN_KEYS[1:], "checkpointing_steps", "keep_last")
_SECONDS_TO_END = 10.0
FINETUNE_ONLY: Mapping[str, type[RunArguments]] = MappingProxyType({FINETUNE: FinetuneArguments})


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed; ``folder`` exists once the run is finished."""

    arm: str
    seed: int
    args: RunArguments
    folder: Path
    script: str = FINETUNE

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name

    @property
    def partial(self) -> Path:
        """Where the run is until it is finished."""
        return self.folder.with_name(f"{self.folder.name}.partial")

    def results(self) -> dict[str, Any] | None:
        """The results; None if the run is not finished."""
        return read_results(self.folder)


@dataclasses.dataclass(frozen=True)
class Study:
    """All runs of a study, arm by arm, in the order of the file; ``metric`` is what its report compares."""

    output_dir: Path
    runs: list[PlannedRun]
    metric: str = "accuracy"

    @property
    def arms(self) -> list[str]:
        """The names of the arms, in order."""
        return list(dict.fromkeys(run.arm for run in self.runs))


Runner = Callable[[Sequence[str], Path], int]
"""(command, log file) -> exit status of the finished command."""


def load_study(
    path: str, output_dir: str | None = None, scripts: Mapping[str, type[RunArguments]] = FINETUNE_ONLY
) -> Study:
    """Reads a study's YAML file: ``base``, ``arms``, ``seeds``, ``output_dir``, and where they are not finetune.py
    and its accuracy, ``script`` and ``metric``.

    Args:
        path: the file.
        output_dir: overrides the one in the file.
        scripts: the settings of each script that a study may name, by its name without ``.py``.

    Raises:
        UsageError: unknown keys, or settings that a run would refuse.
    """
    content = read_yaml(path)
    refuse_unknown(content, _STUDY_KEYS, f"in {path}")
    script, metric = content.get("script", FINETUNE), content.get("metric", Study.metric)
    if script not in scripts:
        raise UsageError(f"script in {path}: expected one of {', '.join(scripts)}, got {script!r}.")
    if not isinstance(metric, str):
        raise UsageError(f"metric in {path}: expected the name of one of the script's metrics, got {metric!r}.")
    kind = scripts[script]
    base = _settings(kind, content.get("base"), f"base of {path}")
    arms = _mapping(content.get("arms"), f"arms in {path}")
    seeds = _seeds(content.get("seeds"), f"seeds in {path}")
    if not arms:
        raise UsageError(f"arms in {path}: expected at least one arm.")
    folder = output_dir or content.get("output_dir")
    if not isinstance(folder, str):
        raise UsageError(f"output_dir in {path}: expected a folder name, got {folder!r}.")
    runs = []
    for arm, differences in arms.items():
        where = f"arm {arm!r} of {path}"
        _check_arm_name(arm, where)
        settings = {**base, **_settings(kind, differences, where)}
        for seed in seeds:
            args = _run_settings(kind, {**settings, "seed": seed}, where)
            runs.append(plan_run(arm, args, Path(folder), script))
    return Study(Path(folder), runs, metric)


def plan_run(arm: str, args: RunArguments, output_dir: Path, script: str = FINETUNE) -> PlannedRun:
    """The run of an arm with a seed; its folder carries a hash of all settings that decide its result.

    Those left at their default do not enter: a setting that is added later leaves the names of finished runs alone.
    """
    default = {field.name: field.default for field in dataclasses.fields(args)}
    content = {k: v for k, v in args.to_dict().items() if k not in _NOT_IN_NAME and v != default[k]}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return PlannedRun(arm, args.seed, args, output_dir / "runs" / f"{arm}-seed{args.seed}-{digest}", script)


def _run_settings(kind: type[RunArguments], settings: dict[str, Any], where: str) -> RunArguments:
    """The checked settings of a run.

    Raises:
        UsageError: a value or a combination that a run would refuse; the message names ``where``.
    """
    try:
        args = kind(**settings)
        attention_config(args)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    return args


def launch_command(run: PlannedRun) -> list[str]:
    """The ``accelerate launch`` of a run: one process, on the GPU if there is one."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", run.args.mixed_precision or "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)]
    if not torch.cuda.is_available():
        command.append("--cpu")
    return [*command, str(SCRIPTS_FOLDER / f"{run.script}.py"), "--config", str(run.partial / "arguments.yaml")]


def run_process(command: Sequence[str], log: Path) -> int:
    """Runs a command with its output in ``log``; if interrupted, ends it and all its children first.

    Returns:
        The exit status.
    """
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"}
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            return child.wait()
        except BaseException:
            _end_group(child)
            raise


def execute(run: PlannedRun, runner: Runner = run_process) -> None:
    """Runs in a ``.partial`` folder that gets the run's name only when the run is finished.

    Raises:
        RuntimeError: the run failed; the message says where its log is.
    """
    if run.folder.exists():
        raise RuntimeError(f"{run.folder} exists but holds no finished run: move it away.")
    if run.partial.exists() and not find_checkpoints(run.partial):
        shutil.rmtree(run.partial)
    run.partial.mkdir(parents=True, exist_ok=True)
    settings = {**run.args.to_dict(), "output_dir": str(run.partial), "resume_from_checkpoint": "latest"}
    write_atomically(run.partial / "arguments.yaml", yaml.safe_dump(settings, sort_keys=False))
    log = run.partial / LOG_FILE
    status = runner(launch_command(run), log)
    if status != 0:
        raise RuntimeError(f"exit status {status}, log in {log}: {_last_line(log)}")
    if read_results(run.partial) is None:
        raise RuntimeError(f"exit status 0 but no results.json, log in {log}")
    run.partial.rename(run.folder)


def run_study(
    runs: Sequence[PlannedRun], after_each: Callable[[], object], runner: Runner = run_process
) -> dict[str, str]:
    """Executes the unfinished ones of ``runs``; one failure does not stop the others.

    Args:
        runs: what to run, in order.
        after_each: called after every run that finished, to bring the report up to date.
        runner: runs one command.

    Returns:
        The message of every failed run by name.
    """
    failures: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        head = f"[{number}/{len(runs)}] {run.name}"
        if run.results() is not None:
            print(f"{head}: finished before", flush=True)
            continue
        print(f"{head}: running", flush=True)
        try:
            execute(run, runner)
        except (RuntimeError, OSError) as error:
            failures[run.name] = str(error)
            print(f"{head}: FAILED: {error}", flush=True)
            continue
        after_each()
    return failures


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """Terminates the child's process group: the launcher does not pass the signal on to the script."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_SECONDS_TO_END)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "(the log is empty)"


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected a mapping, got {value!r}.")
    return value


def _settings(kind: type[RunArguments], value: Any, where: str) -> dict[str, Any]:
    """Checked settings of a run, without those that the study itself sets."""
    settings = check_keys(kind, _mapping(value, where), f"in {where}")
    for key in _OWN_KEYS:
        if key in settings:
            raise UsageError(f"{where}: {key} is set by the study (its seeds and output_dir); remove it here.")
    return settings


def _seeds(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(seed) is int for seed in value):
        raise UsageError(f"{where}: expected a list of integers such as [0, 1, 2], got {value!r}.")
    if len(set(value)) != len(value):
        raise UsageError(f"{where}: {value} holds a seed twice.")
    return value


def _check_arm_name(arm: Any, where: str) -> None:
    if not isinstance(arm, str) or not arm.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UsageError(f"{where}: the name of an arm may hold letters, digits, '-', '_' and '.' only.")
