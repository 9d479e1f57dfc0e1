"""The plots of a study, each with what it shows; what a study lacks is said in a sentence."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from harness.evaluation import NOISE_OFF, NOISE_ON
from study.drawing import SINGLE, draw_bars, draw_curves, draw_dots, draw_estimates, png
from study.exploration import mean_course
from study.findings import Arm, Estimate, Findings, metric_words, mode_words
from study.plan import deciding_settings
from study.tables import marked, peak_memory, step_seconds
from study.verdicts import direction

ATTENTION = {
    "entropy": "entropy without noise, nats",
    "argmax_flip_rate": "share of choices the noise changes",
    "zero_gradient_share": "share of queries without gradient",
}
"""Measures of the attention that are drawn, and what they are."""
CALIBRATION = {
    "calibration_error": "calibration error (ECE)",
    "selective_accuracy": "accuracy on the most confident 80 %",
}
"""Metrics of a classifier's probabilities, and what they are."""
_SEEDS = "Points: means over the seeds with 95 % Student-t intervals; small dots: single seeds."


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure, or why there is none.

    Attributes:
        id: a word.
        title: what it is about.
        caption: what it shows; without a figure, why it is not there.
        figure: the figure; None if the study lacks what it needs.
    """

    id: str
    title: str
    caption: str
    figure: Figure | None

    @functools.cached_property
    def image(self) -> bytes:
        """The figure as a PNG.

        Raises:
            ValueError: there is none.
        """
        if self.figure is None:
            raise ValueError(f"there is no figure of {self.id!r}: {self.caption}")
        return png(self.figure)


def plots(findings: Findings) -> list[Plot]:
    """All plots of a study."""
    make: Sequence[Callable[[Findings], Plot]] = (
        plot_metric,
        plot_tau,
        plot_noise,
        plot_calibration,
        plot_attention,
        plot_exploration,
        plot_loss,
        plot_cost,
    )
    return [function(findings) for function in make]


def plot_metric(findings: Findings) -> Plot:
    """The metric of every arm in every mode."""
    metric = findings.study.metric
    title = f"{metric_words(metric).capitalize()} by arm and evaluation mode"
    figure = _dots(findings, {metric: metric_words(metric)})
    if figure is None:
        return Plot("metric", title, f"Left out: no run has the metric {metric}.", None)
    better = direction(findings.study, metric)
    return Plot("metric", title, f"At the last step; {better} is better. {_SEEDS}", figure)


def plot_tau(findings: Findings) -> Plot:
    """The metric against tau, for arms that differ in tau only."""
    title, metric = "Against tau", findings.study.metric
    lines = {name: _tau_points(findings, arms) for name, arms in tau_groups(findings).items()}
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return Plot("tau", title, "Left out: no two finished arms differ in tau only.", None)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    places = sorted({x for points in lines.values() for x, _ in points})
    beside = {name: 1.03 ** (number - (len(lines) - 1) / 2) for number, name in enumerate(lines)}
    shifted = {name: [(x * beside[name], value) for x, value in points] for name, points in lines.items()}
    draw_estimates(axes, shifted, list(lines))
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tau at the start of training (logarithmic)")
    axes.set_ylabel(f"{metric_words(metric)}, {mode_words(findings.mode)}")
    _legend(figure, axes)
    return Plot(
        "tau",
        title,
        f"Each line: arms whose settings differ in tau only, lines beside each other for legibility. {_SEEDS}",
        figure,
    )


def plot_noise(findings: Findings) -> Plot:
    """The metric by what is done at test time, a line for each arm."""
    title, metric = "Noise at test time", findings.study.metric
    noisy = [mode for mode in findings.modes if mode == NOISE_ON or mode.startswith("mean_")]
    still = [mode for mode in findings.modes if mode not in noisy]
    if len(findings.modes) < 3 or not noisy:
        named = ", ".join(map(mode_words, findings.modes))
        reason = f"Left out: a curve needs more ways to evaluate than {named}; the first plot shows these."
        return Plot("noise", title, reason, None)
    places = {mode: float(index) for index, mode in enumerate(noisy)}
    places |= {mode: len(noisy) + 0.4 + index for index, mode in enumerate(still)}
    figure = Figure(figsize=(max(6.4, 1.1 * len(places) + 2.5), 4.4), layout="constrained")
    axes, names = figure.subplots(), [marked(arm) for arm in findings.arms]
    for group, joined in ((noisy, True), (still, False)):
        points = {name: _mode_points(findings, number, group, places) for number, name in enumerate(names)}
        draw_estimates(axes, {name: found for name, found in points.items() if found}, names, joined)
    axes.axvline(len(noisy) - 0.3, color="0.7", linewidth=0.8)
    axes.set_xticks(list(places.values()), [_samples(mode) for mode in places])
    axes.set_xlabel("evaluation: left with noise, right without; all from the same weights")
    axes.set_ylabel(metric_words(metric))
    _legend(figure, axes)
    caption = (
        "Mean of K: the mean of the probabilities of K noisy passes. Hard: one key for each query, soft: the weighted "
        f"mean. Arms stand beside each other for legibility. {_SEEDS}"
    )
    return Plot("noise", title, caption, figure)


def plot_calibration(findings: Findings) -> Plot:
    """Calibration error and selective accuracy of every arm in every mode."""
    title = "Calibration and selective accuracy"
    figure = _dots(findings, CALIBRATION)
    if figure is None:
        return Plot("calibration", title, "Left out: the runs did not measure it.", None)
    caption = (
        "Left: mean gap between confidence and accuracy (15 bins), lower is better. Right: higher is better. " + _SEEDS
    )
    return Plot("calibration", title, caption, figure)


def plot_attention(findings: Findings) -> Plot:
    """Entropy, flip rate and share without gradient over training."""
    title = "Attention during training"
    found = {measure: _curves(findings, lambda entry, m=measure: _measure(entry, m)) for measure in ATTENTION}
    found = {measure: curves for measure, curves in found.items() if curves}
    if not found:
        return Plot(
            "attention", title, "Left out: the runs did not measure their attention (setting attention_metrics).", None
        )
    figure = Figure(figsize=(3.9 * len(found) + 0.4, 4.0), layout="constrained")
    grid = figure.subplots(1, len(found), squeeze=False)[0]
    names = [marked(arm) for arm in findings.arms]
    for axes, (measure, curves) in zip(grid, found.items(), strict=True):
        draw_curves(axes, curves, names)
        axes.set_xlabel("step")
        axes.set_ylabel(ATTENTION[measure])
    _legend(figure, grid[0])
    caption = (
        "Means over layers, heads, queries and seeds, of single batches. The choice is the key with the largest "
        "weight; where the noise changes it, another key is tried. Without gradient: all other weights round to 0."
    )
    return Plot("attention", title, caption, figure)


def plot_exploration(findings: Findings) -> Plot:
    """What became of the choices of the first evaluation."""
    title = "Recovery from early choices"
    parts = {"recovered": "of the first wrong, share right now", "lost": "of the first right, share wrong now"}
    found = {
        part: {marked(arm): course for arm in findings.arms if (course := mean_course(arm, findings.mode, part))}
        for part in parts
    }
    found = {part: courses for part, courses in found.items() if courses}
    if not found:
        reason = "Left out: the task does not know which choices are right, or was evaluated once only."
        return Plot("exploration", title, reason, None)
    figure = Figure(figsize=(4.6 * len(found) + 0.4, 4.0), layout="constrained")
    grid = figure.subplots(1, len(found), squeeze=False)[0]
    names = [marked(arm) for arm in findings.arms]
    for axes, (part, courses) in zip(grid, found.items(), strict=True):
        draw_curves(axes, courses, names)
        axes.set_xlabel("step of the evaluation")
        axes.set_ylabel(parts[part])
    _legend(figure, grid[0])
    caption = (
        f"Questions of the evaluation data, {mode_words(findings.mode)}: those whose supporting facts were not all "
        "chosen in the first evaluation and are now, and the other way round. Means over the seeds."
    )
    return Plot("exploration", title, caption, figure)


def plot_loss(findings: Findings) -> Plot:
    """The training loss."""
    title = "Training loss"
    curves = _curves(findings, lambda entry: entry.get("loss"))
    if not curves:
        return Plot("loss", title, "Left out: the runs have no training series.", None)
    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, curves, [marked(arm) for arm in findings.arms])
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    _legend(figure, axes)
    return Plot("loss", title, "Mean over the seeds, under each arm's own noise and dropout.", figure)


def plot_cost(findings: Findings) -> Plot:
    """Seconds per step and peak memory."""
    title = "Cost"
    columns = {"training, s per step": step_seconds, "peak memory, MiB": peak_memory}
    values = {label: [measure(arm) for arm in findings.arms] for label, measure in columns.items()}
    values = {label: found for label, found in values.items() if any(found)}
    if not values:
        return Plot("cost", title, "Left out: the runs say neither their steps nor their memory.", None)
    figure = Figure(figsize=(1.6 + 3.4 * len(values), 0.34 * len(findings.arms) + 1.2), layout="constrained")
    grid = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for axes, (label, found) in zip(grid, values.items(), strict=True):
        draw_bars(axes, [marked(arm) for arm in findings.arms], found, label)
    caption = (
        "Bars: means over the seeds; dots: single seeds. Times are those of this machine with what else ran on it, "
        "for orientation only; memory is that of the whole process on a CPU, of torch on a GPU."
    )
    return Plot("cost", title, caption, figure)


def tau_groups(findings: Findings) -> dict[str, list[Arm]]:
    """Arms whose settings differ in tau only, by a name for them; what the search chose does not count."""
    searched = set() if findings.study.search is None else set(findings.study.search.grid)
    groups: dict[str, list[tuple[Arm, float]]] = {}
    for arm in findings.arms:
        args = next(run.args for run in findings.study.runs if run.arm == arm.name)
        settings = {key: value for key, value in deciding_settings(args).items() if key not in {*searched, "tau"}}
        groups.setdefault(repr(sorted(settings.items())), []).append((arm, args.tau))
    found = [[arm for arm, _ in group] for group in groups.values() if len({tau for _, tau in group}) > 1]
    named = [_common_name([arm.name for arm in arms]) for arms in found]
    return {
        name if name and named.count(name) == 1 else ", ".join(arm.name for arm in arms): arms
        for name, arms in zip(named, found, strict=True)
    }


def _common_name(names: Sequence[str]) -> str:
    """What the names begin with, without a number that follows."""
    columns = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in columns).rstrip("0123456789.-_")


def _tau_points(findings: Findings, arms: Sequence[Arm]) -> list[tuple[float, Estimate]]:
    taus = {run.arm: run.args.tau for run in findings.study.runs}
    points = [(taus[arm.name], arm.estimate(findings.mode, findings.study.metric)) for arm in arms]
    return sorted(((tau, found) for tau, found in points if found is not None), key=lambda point: point[0])


def _mode_points(
    findings: Findings, number: int, modes: Sequence[str], places: Mapping[str, float]
) -> list[tuple[float, Estimate]]:
    """(place, estimate) in these modes of the arm of that number, shifted so that arms do not hide each other."""
    shift = 0.5 * ((number + 0.5) / len(findings.arms) - 0.5)
    found = [(places[mode] + shift, findings.arms[number].estimate(mode, findings.study.metric)) for mode in modes]
    return [(place, value) for place, value in found if value is not None]


def _samples(mode: str) -> str:
    return {NOISE_OFF: "noise\noff", NOISE_ON: "one\nsample"}.get(mode, mode_words(mode).replace(" of ", "\nof "))


def _dots(findings: Findings, metrics: Mapping[str, str]) -> Figure | None:
    """A panel of dots for each of the metrics that runs have; None if they have none."""
    present = [
        name for name in metrics if any(arm.values(mode, name) for arm in findings.arms for mode in findings.modes)
    ]
    if not present:
        return None
    height = 0.9 + len(findings.arms) * max(0.4, 0.165 * len(findings.modes))
    figure = Figure(figsize=(2.2 + 4.4 * len(present), height + 0.5), layout="constrained")
    grid = figure.subplots(1, len(present), sharey=True, squeeze=False)[0]
    order = [mode_words(mode) for mode in findings.modes]
    for axes, name in zip(grid, present, strict=True):
        series = {mode_words(mode): [arm.estimate(mode, name) for arm in findings.arms] for mode in findings.modes}
        series = {mode: found for mode, found in series.items() if any(found)}
        draw_dots(axes, [_named(arm) for arm in findings.arms], series, metrics[name], order)
    _legend(figure, grid[0])
    return figure


def _named(arm: Arm) -> str:
    return f"{marked(arm)} (n={len(arm.rows)})"


def _curves(
    findings: Findings, read: Callable[[dict[str, Any]], float | None]
) -> dict[str, tuple[list[float], list[float]]]:
    """Arm -> steps that all its runs logged, and the mean over them of what ``read`` finds there."""
    curves = {}
    for arm in findings.arms:
        runs = [{entry["step"]: read(entry) for entry in row.train_series} for row in arm.rows]
        shared = sorted(set.intersection(*map(set, runs))) if runs else []
        points = [(step, [run[step] for run in runs]) for step in shared]
        known = [(step, values) for step, values in points if all(_finite(value) for value in values)]
        if known:
            means = [math.fsum(value for value in values if value is not None) / len(values) for _, values in known]
            curves[marked(arm)] = ([float(step) for step, _ in known], means)
    return curves


def _measure(entry: Mapping[str, Any], measure: str) -> float | None:
    value: float | None = entry.get("attention", {}).get(measure)
    return value


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(reversed(list(zip(labels, handles, strict=True))))  # of two handles the first
    unique = {label: unique[label] for label in sorted(dict.fromkeys(labels), key=lambda label: label == SINGLE)}
    figure.legend(
        unique.values(), unique.keys(), loc="outside upper center", ncols=3, fontsize="small", handlelength=4
    )
