"""The search that comes before a study: which value of the grid each arm takes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from harness.errors import UsageError
from study.plan import SEARCH_FOLDER, PlannedRun, Study
from study.rows import CHOSEN_FILE, load_row, write_durably


@dataclasses.dataclass(frozen=True)
class ArmSearch:
    """What the search says of an arm.

    Attributes:
        arm: its name.
        means: for every choice of the grid, smaller values first, the mean metric over the search's seeds; None where
            a run is missing or failed.
        chosen: the best of them, the smaller value of equal ones; None if there is none.
        complete: whether every run of the arm is finished.
    """

    arm: str
    means: list[tuple[dict[str, float], float | None]]
    chosen: dict[str, float] | None
    complete: bool


def evaluate_search(study: Study) -> dict[str, ArmSearch]:
    """What the finished runs of the study's search say, arm by arm; empty without a search."""
    if study.search is None:
        return {}
    return {arm: _evaluate_arm(study, arm) for arm in study.search.arms}


def chosen_so_far(study: Study) -> dict[str, dict[str, float]]:
    """Arm -> choice, for the arms whose search is complete."""
    found = evaluate_search(study)
    return {arm: item.chosen for arm, item in found.items() if item.complete and item.chosen is not None}


def write_chosen(study: Study, found: Mapping[str, ArmSearch]) -> None:
    """Writes what was chosen, and from which values, to search/chosen.json."""
    assert study.search is not None
    content: dict[str, Any] = {
        "metric": study.metric,
        "better": study.better,
        "mode": study.search.mode,
        "seeds": study.search.seeds,
        "arms": {
            arm: {
                "chosen": item.chosen,
                "complete": item.complete,
                "means": [{"choice": choice, "mean": mean} for choice, mean in item.means],
            }
            for arm, item in found.items()
        },
    }
    write_durably(
        study.output_dir / SEARCH_FOLDER / CHOSEN_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n"
    )


def _evaluate_arm(study: Study, arm: str) -> ArmSearch:
    assert study.search is not None
    means: list[tuple[dict[str, float], float | None]] = []
    for choice in study.search.choices():
        runs = [run for run in study.search.runs if run.arm == arm and dict(run.choice) == choice]
        values = [_value(run, study.search.mode, study.metric) for run in runs]
        known = [value for value in values if value is not None]
        means.append((choice, math.fsum(known) / len(known) if len(known) == len(values) else None))
    sign = 1.0 if study.better == "higher" else -1.0
    chosen, best = None, -math.inf
    for choice, mean in means:  # smaller values come first, and stay if a larger one is no better
        if mean is not None and sign * mean > best:
            chosen, best = choice, sign * mean
    return ArmSearch(arm, means, chosen, all(mean is not None for _, mean in means))


def _value(run: PlannedRun, mode: str, metric: str) -> float | None:
    try:
        row = load_row(run.row)
    except UsageError:
        return None
    return row.metric(mode, metric)
