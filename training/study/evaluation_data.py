"""What a run is evaluated on, and whether a search keeps away from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from harness.arguments import RunArguments
from harness.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Source:
    """Where data come from.

    Attributes:
        place: what tells files, splits of the hub and generated data from others: a kind, and what belongs to it.
        begin: percentage of the place at which the data begin.
        end: percentage at which they end. Rows drawn from between the two may lie anywhere there.
        documents: what the percentages count, where that is a setting.
    """

    place: tuple[Any, ...]
    begin: int = 0
    end: int = 100
    documents: str | None = None

    def __str__(self) -> str:
        words = " ".join(str(part) for part in self.place if part is not None)
        return words if (self.begin, self.end) == (0, 100) else f"{words}, from {self.begin} to {self.end} %"

    def overlaps(self, other: Source) -> bool:
        """Whether data from here may be data from there, too."""
        if self.place != other.place:
            return _holds(self.place, other.place) or _holds(other.place, self.place)
        if self.documents != other.documents:
            return True
        return self.begin < other.end and other.begin < self.end


def evaluation_source(args: RunArguments) -> Source:
    """Where the evaluation data of a run come from; a subset of the same file or split has the same source.

    So have data that are held out of the training data: which those are depends on percentages and seeds.
    """
    if _holds_out(args):
        return training_source(args)
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    if values.get("validation_split_percentage") is not None:
        trained = training_source(args)
        return dataclasses.replace(trained, begin=trained.end, end=100)
    if values.get("dataset_name") is not None:
        return Source(("split", values["dataset_name"], values["dataset_config_name"], values["validation_split"]))
    if values.get("validation_file"):
        return Source(("file", _resolved(values["validation_file"])))
    return Source(("generated", values.get("data_seed")))


def training_source(args: RunArguments) -> Source:
    """Where the training data of a run come from, those that it holds out included."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    place: tuple[Any, ...]
    if values.get("dataset_name") is not None:
        place = ("split", values["dataset_name"], values["dataset_config_name"], values["train_split"])
    elif values.get("train_file"):
        place = ("file", _resolved(values["train_file"]))
    else:
        place = ("generated to train on", values.get("data_seed"))
    return Source(place, end=100 - (values.get("validation_split_percentage") or 0), documents=values.get("sample_by"))


def check_other_evaluation_data(search: RunArguments, study: RunArguments, where: str) -> None:
    """Raises UsageError unless a run of the search keeps away from what the study evaluates on.

    A run of the search may hold out a part of its training data (``holdout_percentage``). If the study evaluates on
    the end of these (``validation_split_percentage``), the search must leave off as much, or more. Two splits of the
    hub that are slices of one, such as ``train[:90%]`` and ``train[90%:]``, count as others if their texts differ.

    Args:
        search: settings of a run of the search.
        study: settings of the same arm in the study.
        where: the run, for messages.
    """
    tested, searched, trained = evaluation_source(study), evaluation_source(search), training_source(search)
    if searched.overlaps(tested):
        raise UsageError(
            f"{where} would be evaluated on the study's own evaluation data ({tested}), and what it chooses would be "
            "fitted to them: let settings of the search name another validation_file or validation_split, or "
            "evaluate on a part of the training data by holdout_percentage."
        )
    if trained.overlaps(tested):
        raise UsageError(
            f"{where} would be trained on the study's evaluation data ({tested}): let settings of the search name "
            "other training data."
        )
    if trained.overlaps(searched) and not _holds_out(search):
        raise UsageError(
            f"{where} would be evaluated on what it is trained on ({searched}): hold some of the training data out by "
            "holdout_percentage, or in a file or split of their own."
        )


def _holds_out(args: RunArguments) -> bool:
    return getattr(args, "holdout_percentage", None) is not None


def _resolved(path: str) -> str:
    return str(Path(path).resolve())


def _holds(whole: tuple[Any, ...], part: tuple[Any, ...]) -> bool:
    """Whether a split of the hub in ``whole`` is one in ``part``, too, or holds a slice that is."""
    if whole[0] != "split" or part[0] != "split" or whole[1:3] != part[1:3]:
        return False
    parts = _splits(part[3])
    return any(split == other or split == other.split("[")[0] for split in _splits(whole[3]) for other in parts)


def _splits(words: str) -> list[str]:
    """The splits of ``train+validation[:10%]``, as the hub's data sets join them."""
    return [split.strip() for split in words.split("+")]
