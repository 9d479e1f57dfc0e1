"""Trackers: TensorBoard, Weights & Biases or Trackio get the series of results.json while the run makes them.

A value stands at the optimiser step it was measured at. A run that goes on from a checkpoint goes on under the same
name. What it had measured after that checkpoint, before it was killed, comes a second time, on one process with equal
values: TensorBoard hides the first, Weights & Biases takes no step that is past, Trackio shows both. What a tracker
still held back when the run was killed is missing there; results.json is whole.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

from harness.arguments import TRACKERS, RunArguments
from harness.errors import UsageError
from harness.saved_run import read_identity, read_steps

TRACKER_FOLDER = "tensorboard"
_NESTED = ("attention", "attention_layers")


def installed_trackers(report_to: str) -> list[str]:
    """The trackers that the setting asks for.

    Raises:
        UsageError: one of them is not installed; of ``all``, none is.
    """
    if report_to == "none":
        return []
    available = {str(each) for each in get_available_trackers()}
    installed = [name for name in TRACKERS if name in available]
    if report_to == "all":
        if not installed:
            raise UsageError(
                f"report_to=all, but none of {', '.join(TRACKERS)} is installed: pip install one of them."
            )
        return installed
    wanted = list(dict.fromkeys(name.strip() for name in report_to.split(",")))
    missing = [name for name in wanted if name not in installed]
    if missing:
        raise UsageError(
            f"report_to={report_to} needs what is not installed: pip install {' '.join(missing)}, or report_to=none."
        )
    return wanted


def tracker_options(args: RunArguments) -> dict[str, Any]:
    """What the Accelerator of the run is told of trackers.

    Raises:
        UsageError: as :func:`installed_trackers`.
    """
    folder = Path(args.output_dir)
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / TRACKER_FOLDER))
    return {"log_with": installed_trackers(args.report_to) or None, "project_config": project}


def tracking_id(args: RunArguments, checkpoint: Path | None) -> str | None:
    """The run's name among trackers: that of the checkpoint's run, if it is the same; None without trackers."""
    if checkpoint is not None and checkpoint.resolve().parent == Path(args.output_dir).resolve():
        known = read_identity(checkpoint).tracking_id
        if known is not None:
            return known
    return None if args.report_to == "none" else uuid.uuid4().hex[:12]


@contextmanager
def tracked(
    accelerator: Accelerator, args: RunArguments, tracking_id: str | None, checkpoint: Path | None
) -> Iterator[None]:
    """Starts the trackers, on the first process; they are told the end of the run however this context is left.

    Args:
        accelerator: made with :func:`tracker_options`; its ``log`` reaches the trackers in this context.
        args: the settings of the run.
        tracking_id: the run's name among them.
        checkpoint: what the run goes on from; None if it begins.

    Raises:
        UsageError: a tracker does not start.
    """
    if accelerator.log_with and accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        _start(accelerator, args, str(tracking_id), checkpoint)
    try:
        yield
    finally:
        while accelerator.trackers:
            accelerator.trackers.pop().finish()


def train_values(entry: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, float]:
    """What trackers are told of an entry of the training series, and of the speed since the one before."""
    values = {f"train/{key}": value for key, value in {**entry, **rates}.items() if key not in ("step", *_NESTED)}
    values |= {f"attention/{measure}": value for measure, value in entry.get("attention", {}).items()}
    for layer, measures in entry.get("attention_layers", {}).items():
        values |= {f"attention/{layer}/{measure}": value for measure, value in measures.items()}
    return _given(values)


def evaluation_values(entry: Mapping[str, Any]) -> dict[str, float]:
    """What trackers are told of an entry of the evaluation series."""
    place = ("step", "epoch", "tau", "mode")
    return _given({f"eval/{entry['mode']}/{key}": value for key, value in entry.items() if key not in place})


def bar_text(entry: Mapping[str, Any], rates: Mapping[str, float]) -> str:
    """What the progress bar shows of an entry of the training series, and of the speed since the one before."""
    tau = "" if entry["tau"] is None else f", tau {entry['tau']:.4g}"
    unit = "tokens" if "tokens_per_second" in rates else "examples"
    return f"loss {entry['loss']:.4f}{tau}, {rates[f'{unit}_per_second']:.0f} {unit}/s"


def _given(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in values.items() if value is not None}


def _start(accelerator: Accelerator, args: RunArguments, tracking_id: str, checkpoint: Path | None) -> None:
    name = Path(args.output_dir).resolve().name
    known = checkpoint is not None and read_identity(checkpoint).tracking_id == tracking_id
    settings = {key: _plain(value) for key, value in args.to_dict().items()}
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": 1 + (0 if checkpoint is None else read_steps(checkpoint))},
        "wandb": {"id": tracking_id, "name": name, "resume": "allow", "dir": args.output_dir},
        "trackio": {"name": f"{name}-{tracking_id}", "resume": "allow"},
    }
    try:
        accelerator.init_trackers(args.project_name, None if known else settings, options)
    except Exception as error:  # each tracker has errors of its own: not logged in, no network, a name it refuses
        raise UsageError(
            f"report_to={args.report_to}: the trackers do not start: {type(error).__name__}: {error}"
        ) from error


def _plain(value: Any) -> bool | int | float | str:
    """A setting as all trackers take it."""
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
