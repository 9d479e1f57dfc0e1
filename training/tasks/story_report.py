"""The table of the estimators compared on stories, a function of the study's JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

HEADS = (
    "arm",
    "learning rate",
    "test accuracy",
    "with noise",
    "one key",
    "steps to target",
    "ms per step",
    "extra forward passes",
)


def choose_rate(results: Mapping[str, Any], arm: str) -> float:
    """The learning rate of an arm with the best last validation accuracy in seed 0, of equal ones the fastest.

    Raises:
        ValueError: the arm has no run in seed 0.
    """
    rates = results["settings"]["learning_rates"]
    rows = [row for row in _rows(results, arm) if row["seed"] == 0 and row["learning_rate"] in rates]
    if not rows:
        raise ValueError(f"the results hold no run of arm {arm!r} with seed 0 at the learning rates {rates}.")
    best = max(rows, key=lambda row: (row["validation"], math.fsum(value for _, value in row["curve"])))
    return float(best["learning_rate"])


def chosen_runs(results: Mapping[str, Any], arm: str) -> list[Mapping[str, Any]]:
    """The runs of an arm at its chosen learning rate, in the order of their seeds."""
    rate, seeds = choose_rate(results, arm), range(results["settings"]["seeds"])
    own = [row for row in _rows(results, arm) if row["learning_rate"] == rate and row["seed"] in seeds]
    return sorted(own, key=lambda row: row["seed"])


def report(results: Mapping[str, Any]) -> str:
    """Markdown: one row for each arm that has runs, in the order they were asked for, and how to read it."""
    tried = {row["arm"] for row in results["runs"] if row["learning_rate"] in results["settings"]["learning_rates"]}
    finished = [arm for arm in results["settings"]["arms"] if arm in tried]
    rule = ["---"] + ["---:"] * (len(HEADS) - 1)
    rows = [_cells(results, arm) for arm in finished]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [HEADS, rule, *rows])
    legend = [f"- `{arm}`: {results['meanings'][arm]}." for arm in finished]
    return "\n".join([table, "", _notes(results), "", *legend, ""])


def _rows(results: Mapping[str, Any], arm: str) -> list[Mapping[str, Any]]:
    return [row for row in results["runs"] if row["arm"] == arm]


def _cells(results: Mapping[str, Any], arm: str) -> list[str]:
    runs = chosen_runs(results, arm)
    steps = [row["steps_to_target"] for row in runs]
    rates = results["settings"]["learning_rates"]
    edge = "" if len(rates) == 1 else f" of {', '.join(f'{rate:g}' for rate in rates)}"
    lost = [row["seed"] for row in runs if row["lost_at"] is not None]
    seeds = f" (n={len(runs)})" if len(runs) < results["settings"]["seeds"] else ""
    return [
        f"`{arm}`{seeds}" + (f", loss not finite in seed {', '.join(map(str, lost))}" if lost else ""),
        f"{runs[0]['learning_rate']:g}{edge}",
        *(_percent([row[key] for row in runs]) for key in ("test", "test_noise", "test_one_key")),
        ", ".join("not reached" if step is None else str(step) for step in steps),
        f"{1e3 * _mean([row['seconds_per_step'] for row in runs]):.0f}",
        str(runs[0]["extra_passes"]),
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _percent(values: Sequence[float]) -> str:
    mean = f"{100 * _mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def _notes(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    lines = [
        f"Percent of {settings['test_stories']} test stories, mean and range over {settings['seeds']} seeds, after "
        f"{settings['steps']} AdamW steps of {settings['batch_size']} stories. Test accuracy is without noise; "
        f'"with noise" is the mean of {results["noisy_passes"]} passes under the arm\'s own noise, Gumbel noise '
        'for arms without any; "one key" is without noise, each head reading only the key of largest score.',
        f"Steps to target: when {settings['target']:.0%} of the validation stories were first right, seed by "
        f"seed, looked at every {settings['eval_every']} steps.",
        f"Temperature: exponential from {settings['tau_start']:g} to {settings['tau_end']:g}, where the legend "
        "does not say otherwise. Learning rate: the best on the validation stories of seed 0.",
        "ms per step: processor time of one thread on a shared machine, for orientation only.",
    ]
    return "\n".join(lines)
