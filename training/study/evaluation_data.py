"""What a run is evaluated on, and whether a search keeps away from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from harness.arguments import RunArguments
from harness.errors import UsageError

Source = tuple[Any, ...]
"""What tells data from others: a kind, and what belongs to it."""


def evaluation_source(args: RunArguments) -> Source:
    """Where the evaluation data of a run come from; a subset of the same file or split has the same source."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    held_out = tuple((key, value) for key, value in values.items() if "holdout" in key and value is not None)
    if values.get("dataset_name") is not None:
        return (
            "split",
            values["dataset_name"],
            values.get("dataset_config_name"),
            values["validation_split"],
            *held_out,
        )
    if values.get("validation_file"):
        return ("file", _resolved(values["validation_file"]), *held_out)
    if values.get("validation_split_percentage") is not None:
        return ("end of", _resolved(values["train_file"]), *held_out)
    return ("generated", values.get("data_seed"), *held_out)


def training_source(args: RunArguments) -> Source:
    """Where the training data of a run come from, in the words of :func:`evaluation_source`."""
    if getattr(args, "dataset_name", None) is not None:
        return ("split", args.dataset_name, args.dataset_config_name, args.train_split)  # type: ignore[attr-defined]
    train_file = getattr(args, "train_file", None)
    return ("file", _resolved(train_file)) if train_file else ("generated to train on",)


def check_other_evaluation_data(search: RunArguments, study: RunArguments, where: str) -> None:
    """Raises UsageError unless a run of the search keeps away from what the study evaluates on.

    Two splits of the hub that are slices, such as ``train[:90%]`` and ``train[90%:]``, count as others if their texts
    differ.

    Args:
        search: settings of a run of the search.
        study: settings of the same arm in the study.
        where: the run, for messages.
    """
    tested, searched = evaluation_source(study), evaluation_source(search)
    if searched == tested or _holds(searched, tested) or _holds(tested, searched):
        raise UsageError(
            f"{where} would be evaluated on the study's own evaluation data ({_words(tested)}), and what it chooses "
            "would be fitted to them: let settings of the search name another validation_file or validation_split."
        )
    trained = training_source(search)
    if trained in (tested, ("file", tested[1])) or _holds(trained, tested):
        raise UsageError(
            f"{where} would be trained on the study's evaluation data ({_words(tested)}): let settings of the search "
            "name other training data."
        )
    if trained == searched or _holds(trained, searched):
        raise UsageError(
            f"{where} would be evaluated on what it is trained on ({_words(searched)}): hold some of the training "
            "data out, in a file or split of their own."
        )


def _resolved(path: str) -> str:
    return str(Path(path).resolve())


def _holds(whole: Source, part: Source) -> bool:
    """Whether ``whole`` is a split of the hub of which ``part`` is a slice."""
    if whole[0] != "split" or part[0] != "split":
        return False
    return whole[1:3] == part[1:3] and "[" not in whole[3] and part[3].split("[")[0] == whole[3]


def _words(source: Source) -> str:
    return " ".join(str(part) for part in source if part is not None)
