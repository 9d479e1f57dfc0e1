"""The table, the paired statistics and the plot of a comparison of estimators on a discrete VAE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from scipy import stats

PUBLISHED = {"reinforce-average": 110.6, "softmax-st": 110.9, "gumbel-soft": 101.5, "gumbel-st": 107.8}
"""Test negative ELBO on MNIST in nats: Jang, Gu & Poole (2017), Table 1, VAE with categorical variables."""

FURTHER = (
    ("gumbel-rao", "gumbel-st"),
    ("reinmax", "softmax-st"),
    ("reinmax", "gumbel-st"),
    ("reinforce-loo", "reinforce-average"),
)
LEVEL = 0.05
_LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MARKERS = "osv^DxP"


class Comparison(NamedTuple):
    """First minus second arm, paired by seed.

    Attributes:
        first: name of an arm.
        second: name of another.
        mean: mean difference.
        half_width: of its 95% Student-t interval.
        p: of the two-sided paired t-test.
        adjusted: p after Holm's correction over the comparisons of the table.
    """

    first: str
    second: str
    mean: float
    half_width: float
    p: float
    adjusted: float


def choose_rate(results: Mapping[str, Any], arm: str) -> float:
    """The learning rate of an arm with the lowest mean validation bound over the selection seeds."""
    settings = results["settings"]
    values = {(row["learning_rate"], row["seed"]): row["validation"] for row in results["runs"] if row["arm"] == arm}
    seeds = range(settings["selection_seeds"])
    return min(settings["learning_rates"], key=lambda rate: math.fsum(values[rate, seed] for seed in seeds))


def chosen_runs(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """For each arm its runs at the chosen learning rate, in the order of their seeds."""
    chosen = {}
    for arm in results["settings"]["arms"]:
        rate = choose_rate(results, arm)
        own = {row["seed"]: row for row in results["runs"] if (row["arm"], row["learning_rate"]) == (arm, rate)}
        chosen[arm] = [own[seed] for seed in range(results["settings"]["seeds"])]
    return chosen


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference, half width of its 95% t-interval, and p of the two-sided paired t-test."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    count = len(differences)
    mean, spread = _mean_and_spread(differences)
    error = spread / math.sqrt(count)
    half_width = float(stats.t.ppf(0.975, count - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error > 0 else float(mean == 0)
    return mean, half_width, p


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the family-wise error stays below the level an adjusted p is compared with."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min((len(values) - rank) * values[index], 1.0))
        adjusted[index] = highest
    return adjusted


def compare(chosen: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Comparison]:
    """Every pair of the published arms that was run, better one first as published, then the further pairs."""
    order = sorted(PUBLISHED, key=lambda arm: PUBLISHED[arm])
    pairs = [(a, b) for index, a in enumerate(order) for b in order[index + 1 :]] + list(FURTHER)
    pairs = [pair for pair in pairs if pair[0] in chosen and pair[1] in chosen]
    tests = [paired(*([row["test"] for row in chosen[arm]] for arm in pair)) for pair in pairs]
    adjusted = holm([test[2] for test in tests])
    return [Comparison(*pair, *test, p) for pair, test, p in zip(pairs, tests, adjusted, strict=True)]


def report(results: Mapping[str, Any]) -> str:
    """Markdown: the arms, the paired comparisons, the order found and the published one."""
    chosen = chosen_runs(results)
    parts = [_arms_table(chosen, results["settings"]["learning_rates"]), _order(chosen)]
    comparisons = compare(chosen)
    if comparisons:
        parts.append(_comparison_table(comparisons))
    legend = [f"- `{name}`: {meaning}." for name, meaning in results["meanings"].items()]
    return "\n".join(["\n\n".join(parts), "", _notes(results), "", *legend, ""])


def plot(results: Mapping[str, Any]) -> Figure:
    """The validation bound in training, mean over seeds at the chosen learning rate, one line for each arm."""
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.subplots()
    settings, lowest, highest = results["settings"], math.inf, -math.inf
    for index, (arm, rows) in enumerate(chosen_runs(results).items()):
        values = [math.fsum(column) / len(rows) for column in zip(*(row["curve"] for row in rows), strict=True)]
        steps = [min((k + 1) * settings["eval_every"], settings["steps"]) for k in range(len(values))]
        lowest, highest = min(lowest, *values), max(highest, values[len(values) // 8])
        style = {"linestyle": _LINES[index % len(_LINES)], "marker": _MARKERS[index % len(_MARKERS)]}
        every = max(len(steps) // 8, 1)
        axes.plot(
            steps,
            values,
            color="black",
            linewidth=1.1,
            markersize=5,
            markevery=(index % every, every),
            label=arm,
            **style,
        )
    margin = max(0.04 * (highest - lowest), 0.05)
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("validation negative ELBO, nats (hard samples)")
    axes.grid(color="0.9")
    axes.legend(fontsize="small", frameon=False)
    return figure


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _ranked(chosen: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    return sorted(chosen, key=lambda arm: math.fsum(row["test"] for row in chosen[arm]))


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    rule = ["---"] * text_columns + ["---:"] * (len(heads) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *rows])


def _arms_table(chosen: Mapping[str, Sequence[Mapping[str, Any]]], grid: Sequence[float]) -> str:
    heads = [
        "arm",
        "learning rate",
        "test -ELBO",
        "reconstruction",
        "KL",
        "best step",
        "Jang et al., MNIST",
    ]
    rows = []
    for arm in _ranked(chosen):
        runs = chosen[arm]
        rate = runs[0]["learning_rate"]
        edge = " (edge)" if len(grid) > 1 and rate in (min(grid), max(grid)) else ""
        mean, spread = _mean_and_spread([row["test"] for row in runs])
        columns = [_mean_and_spread([row[key] for row in runs])[0] for key in ("reconstruction", "divergence")]
        steps = sorted(row["best_step"] for row in runs)
        published = f"{PUBLISHED[arm]:.1f}" if arm in PUBLISHED else ""
        rows.append(
            [f"`{arm}`", f"{rate:g}{edge}", f"{mean:.2f} ± {spread:.2f}", *(f"{value:.2f}" for value in columns)]
            + [f"{steps[0]} to {steps[-1]}", published]
        )
    return _markdown(heads, rows)


def _order(chosen: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    found = [arm for arm in _ranked(chosen) if arm in PUBLISHED]
    theirs = sorted(found, key=lambda arm: PUBLISHED[arm])
    verdict = "the same" if found == theirs else "another"
    return (
        f"Order of the means, best first: {' < '.join(found)}.\n"
        f"Published order: {' < '.join(theirs)}. The order of the means is {verdict}; what of it is beyond chance:"
    )


def _comparison_table(comparisons: Sequence[Comparison]) -> str:
    rows = []
    for item in comparisons:
        known = item.first in PUBLISHED and item.second in PUBLISHED
        theirs = f"{PUBLISHED[item.first] - PUBLISHED[item.second]:+.1f}" if known else ""
        decided = item.adjusted < LEVEL
        verdict = ("agrees" if item.mean < 0 else "contrary") if known else ("lower" if item.mean < 0 else "higher")
        rows.append(
            [f"{item.first} - {item.second}", f"{item.mean:+.2f} ± {item.half_width:.2f}", f"{item.p:.2g}"]
            + [f"{item.adjusted:.2g}", theirs, verdict if decided else "undecided"]
        )
    heads = ["difference", "mean ± 95% half width", "p", "p, Holm", "published", f"verdict at {LEVEL:g}"]
    return _markdown(heads, rows)


def _notes(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    relaxed = [row["relaxed"] for row in chosen_runs(results).get("gumbel-soft", ()) if "relaxed" in row]
    rates = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
    lines = [
        f"Nats per test image, mean ± standard deviation over {settings['seeds']} seeds; lower is better. Hard "
        f"samples of the posterior, {settings['test_samples']} for each image, and the exact KL to the uniform prior.",
        f"{settings['steps']} Adam steps of {settings['batch_size']} images in every run; the weights tested are "
        "those that did best on the validation images.",
        f"Learning rates: {rates}, chosen on the validation images of the first {settings['selection_seeds']} of the "
        'seeds; "edge": the best is at an end of the grid.',
        "Differences are paired by seed (split of the images, initialisation, order of the data): Student's t, "
        "two-sided, Holm's correction over the table.",
    ]
    if "reinforce-loo" in settings["arms"]:
        lines.append(
            "`reinforce-loo` draws 4 samples of the latent variables for each image and step, the others one."
        )
    if relaxed:
        mean = _mean_and_spread(relaxed)[0]
        lines.append(f"With relaxed samples gumbel-soft's own objective, which is no bound, is {mean:.2f}.")
    return "\n".join(lines)
