"""How a run recovers from wrong early choices, and how many right ones it loses, example by example."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from harness.right_wrong import from_text
from study.findings import Arm
from study.rows import Row

RIGHT = "right_choices"
"""What an entry of the evaluation series calls the choices that were right."""


@dataclasses.dataclass(frozen=True)
class Exploration:
    """What became of the choices of the first evaluation.

    Attributes:
        steps: of the evaluations.
        recovered: by evaluation, the share of the examples wrong in the first that are right in it.
        lost: by evaluation, the share of the examples right in the first that are wrong in it.
    """

    steps: tuple[int, ...]
    recovered: tuple[float, ...]
    lost: tuple[float, ...]


def exploration_of(row: Row, mode: str) -> Exploration | None:
    """Of one run; None if it did not record its choices in this mode twice.

    A share of no examples, such as those lost of none that were right, is NaN.
    """
    entries = [entry for entry in row.evaluation_series if entry["mode"] == mode and RIGHT in entry]
    if len(entries) < 2:
        return None
    right = np.array([from_text(entry[RIGHT]) for entry in entries])
    first = right[0]
    return Exploration(
        steps=tuple(entry["step"] for entry in entries),
        recovered=_shares(right[:, ~first]),
        lost=_shares(~right[:, first]),
    )


def mean_course(arm: Arm, mode: str, part: str) -> tuple[list[float], list[float]] | None:
    """Steps, and the mean over the seeds of ``recovered`` or ``lost``; None if no run recorded its choices.

    Args:
        arm: with its runs.
        mode: of the evaluations.
        part: name of the attribute of :class:`Exploration`.
    """
    found = [each for row in arm.rows if (each := exploration_of(row, mode)) is not None]
    if not found or any(each.steps != found[0].steps for each in found):
        return None
    courses: list[Sequence[float]] = [getattr(each, part) for each in found]
    means = [math.fsum(values) / len(values) for values in zip(*courses, strict=True)]
    known = [(float(step), mean) for step, mean in zip(found[0].steps, means, strict=True) if math.isfinite(mean)]
    return ([step for step, _ in known], [mean for _, mean in known]) if known else None


def _shares(truth: np.ndarray) -> tuple[float, ...]:
    """The mean of each row of truth values (evaluations, examples)."""
    if not truth.shape[1]:
        return (math.nan,) * len(truth)
    return tuple(truth.mean(1).tolist())
