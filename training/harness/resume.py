"""What a run does with the folder it is told to use: begin, go on, or refuse."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from harness.arguments import RunArguments
from harness.checkpoints import check, find_checkpoints, latest, remove_checkpoints, remove_leftovers
from harness.errors import UsageError
from harness.results import CONFIG_FILE, RESULTS_FILE, read_results
from harness.saved_run import RunIdentity, read_identity
from harness.tracking import TRACKER_FOLDER

LATEST = "latest"
FREE_SETTINGS = frozenset(
    (
        *("output_dir", "overwrite_output_dir", "save_model", "checkpointing_steps", "keep_last"),
        *("resume_from_checkpoint", "report_to", "project_name", "attention_metrics", "dry_run", "cache_dir"),
    )
)
"""Settings that change nothing in what a run computes."""
COMPARED_AS_DATA = frozenset(("train_file", "validation_file"))
"""Where a checkpoint is gone on with, the data themselves are compared: the files may have moved."""
_BATCH_SETTINGS = frozenset(("per_device_train_batch_size", "gradient_accumulation_steps"))  # their product is


def prepare_output(args: RunArguments, accelerator: Accelerator, tell: Callable[[str], object]) -> Path | None:
    """Decides whether the run begins or goes on, and clears ``output_dir`` where told to overwrite.

    Args:
        args: the settings of the run.
        accelerator: of the run; all its processes call this together.
        tell: prints a line.

    Returns:
        The checkpoint to go on from, verified; None to begin.

    Raises:
        UsageError: the folder holds another run, or the checkpoint is not usable.
    """
    decision: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            decision[0] = _decide(args, accelerator.num_processes, tell)
        except UsageError as error:
            decision[1] = str(error)
    broadcast_object_list(decision)
    if decision[1] is not None:
        raise UsageError(decision[1])
    return None if decision[0] is None else Path(decision[0])


def finished_before(args: RunArguments) -> dict[str, Any] | None:
    """The results in ``output_dir`` if they are those of this very run, which is to go on; there is nothing to do.

    Raises:
        UsageError: they are of another run.
    """
    results = None if args.resume_from_checkpoint is None else read_results(Path(args.output_dir))
    if results is None:
        return None
    different = differing_settings(results.get("config", {}), args, free=())
    if different:
        raise UsageError(_other_run(args.output_dir, "a finished run", different))
    return results


def check_data(checkpoint: Path, identity: RunIdentity, tell: Callable[[str], object]) -> None:
    """Compares the data of a checkpoint's run with the present ones; tells of another environment.

    Raises:
        UsageError: they differ; the message lists the differences.
    """
    saved = read_identity(checkpoint)
    _refuse_other(checkpoint, _differences(saved.data, identity.data, "data."))
    if saved.processes != identity.processes:
        tell(f"the checkpoint is of {saved.processes} processes, this run has {identity.processes}: not to the bit")
    for key, (then, now) in _differences(saved.environment, identity.environment).items():
        tell(f"not to the bit perhaps: {key} was {then!r} and is {now!r}")
    if saved.code != identity.code:
        tell(f"not to the bit perhaps: the code was {saved.code[-1:]} and is {identity.code[-1:]}")


def differing_settings(
    saved: Mapping[str, Any], args: RunArguments, free: Iterable[str]
) -> dict[str, tuple[Any, Any]]:
    """Name -> (saved, present) of the settings that matter and differ; a setting not saved had its default.

    Args:
        saved: settings of another run.
        args: of this one.
        free: settings that may differ, beside those that change nothing in what a run computes.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    present = args.to_dict()
    then = {key: saved.get(key, defaults[key]) for key in present} | dict(saved)
    passed_over = FREE_SETTINGS.union(free)
    return {key: pair for key, pair in _differences(then, present).items() if key not in passed_over}


def _decide(args: RunArguments, processes: int, tell: Callable[[str], object]) -> str | None:
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if args.overwrite_output_dir:
        remove_checkpoints(folder)
        shutil.rmtree(folder / TRACKER_FOLDER, ignore_errors=True)
        for name in (RESULTS_FILE, CONFIG_FILE):
            (folder / name).unlink(missing_ok=True)
        return None
    if wanted is None:
        _refuse_occupied(folder, args)
        return None
    checkpoint = latest(folder, tell) if wanted == LATEST else Path(wanted)
    if wanted != LATEST:
        check(Path(wanted))
    if checkpoint is None or checkpoint.resolve().parent != folder.resolve():
        _refuse_occupied(folder, args)
    if checkpoint is not None:
        _check_settings(checkpoint, args, processes)
    remove_leftovers(folder)
    tell(f"goes on from {checkpoint}" if checkpoint else f"no checkpoint to go on from in {str(folder)!r}: begins")
    return str(checkpoint) if checkpoint else None


def _check_settings(checkpoint: Path, args: RunArguments, processes: int) -> None:
    """Compares what can be compared before the data are loaded."""
    saved = read_identity(checkpoint)
    batches = frozenset[str]() if saved.processes == processes else _BATCH_SETTINGS
    different = differing_settings(saved.config, args, COMPARED_AS_DATA | batches)
    present = dataclasses.replace(saved, config=args.to_dict(), processes=processes)
    if saved.examples_per_step != present.examples_per_step:
        different["examples per optimiser step"] = (saved.examples_per_step, present.examples_per_step)
    _refuse_other(checkpoint, different)


def _refuse_other(checkpoint: Path, different: Mapping[str, tuple[Any, Any]]) -> None:
    if different:
        raise UsageError(
            f"the checkpoint {str(checkpoint)!r} is from another configuration; these differ (checkpoint -> now): "
            f"{_listed(different)}. Use the checkpoint's settings, which are in its {CONFIG_FILE}, or begin anew in "
            "another output_dir."
        )


def _refuse_occupied(folder: Path, args: RunArguments) -> None:
    """Raises UsageError if a run began in ``folder``, but one of the same settings that left nothing to lose."""
    if read_results(folder) is not None:
        raise UsageError(
            f"output_dir {str(folder)!r} holds a finished run: choose another, or pass --overwrite_output_dir."
        )
    found = find_checkpoints(folder)
    if found and args.resume_from_checkpoint != LATEST:
        raise UsageError(
            f"output_dir {str(folder)!r} holds a run that got to {found[0].name}: choose another, go on with "
            "--resume_from_checkpoint latest, or pass --overwrite_output_dir."
        )
    config = folder / CONFIG_FILE
    if not config.is_file():
        return
    try:
        saved = yaml.safe_load(config.read_text(encoding="utf-8"))
        different = differing_settings(saved, args, free=())
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError):
        different = {CONFIG_FILE: ("unreadable", "")}
    if different:
        raise UsageError(_other_run(str(folder), "another run", different))


def _other_run(folder: str, what: str, different: Mapping[str, tuple[Any, Any]]) -> str:
    return (
        f"output_dir {folder!r} holds {what} of other settings (there -> here): {_listed(different)}. "
        "Choose another, or pass --overwrite_output_dir."
    )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    pairs = {key: (then.get(key), now.get(key)) for key in [*now, *(key for key in then if key not in now)]}
    return {f"{prefix}{key}": pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _listed(different: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key}: {then!r} -> {now!r}" for key, (then, now) in different.items())
