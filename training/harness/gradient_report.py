"""Results, table and plots of the comparison of gradient estimators."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from harness.gradient_problems import Problem, exact_gradient, straight_through_limit
from harness.gradient_samples import BASELINES, Setting
from harness.gradient_statistics import Quality
from harness.gradient_study import Study, by_arm
from harness.gradient_verdicts import Relation

COLUMNS = (
    "problem",
    "loss",
    "arm",
    "tau",
    "samples",
    "baseline",
    "estimates",
    "relative_bias",
    "relative_bias_low",
    "relative_bias_high",
    "relative_variance",
    "cosine",
)
NOTE = """\
All figures are in units of the exact gradient's length: bias, the length of mean - truth, with a 95% interval that
holds for any true bias, zero included; variance, the trace of one estimate's covariance over the squared length;
cosine of the angle between mean and truth. K: samples of noise for one choice (`gumbel-rao`), or choices averaged in
one estimate (`reinforce`); an average over m independent estimates of any other kind has the same bias and 1/m of the
variance. `softmax-tau` and `det-st` are without noise: one number, no variance. `reinforce` does not depend on tau.

A relation holds, or does not, at a false-alarm rate of 1e-6; it is undecided where the samples are too few.
"""
_FLOOR = 2e-3
_LOWEST_VARIANCE, _HIGHEST_VARIANCE = 1e-4, 1e3
_STYLES: dict[tuple[str, int], dict[str, Any]] = {
    ("gumbel-soft", 1): {"marker": "o", "linestyle": "-", "color": "black"},
    ("gumbel-st", 1): {"marker": "s", "linestyle": "--", "color": "black", "markerfacecolor": "white"},
    ("gumbel-rao", 10): {"marker": "^", "linestyle": ":", "color": "0.35"},
    ("gumbel-rao", 100): {"marker": "v", "linestyle": ":", "color": "0.35", "markerfacecolor": "white"},
    ("reinmax", 1): {"marker": "D", "linestyle": "-.", "color": "black"},
    ("softmax-tau", 1): {"marker": "x", "linestyle": "-", "color": "0.6"},
    ("det-st", 1): {"marker": "+", "linestyle": "--", "color": "0.6", "markersize": 8},
}
_SCORE_LINES: dict[tuple[str, int], dict[str, Any]] = {
    ("none", 1): {"linestyle": (0, (1, 1)), "linewidth": 1.6},
    ("moving average", 1): {"linestyle": (0, (6, 2))},
    ("none", 10): {"linestyle": (0, (1, 3)), "linewidth": 1.6},
    ("leave-one-out", 10): {"linestyle": (0, (6, 2, 1, 2))},
}


def results_json(study: Study, relations: Sequence[Relation], head: dict[str, Any]) -> str:
    """Settings, exact gradients, relations and one line for each problem, loss and setting."""
    content = {
        **head,
        "plan": dataclasses.asdict(study.plan),
        "problems": [_problem_entry(problem) for problem in study.problems],
        "relations": [dataclasses.asdict(relation) for relation in relations],
        "columns": COLUMNS,
        "rows": [],
    }
    lines = [json.dumps(line, allow_nan=False) for line in _lines(study)]
    return json.dumps(content, indent=1, allow_nan=False).replace(
        '"rows": []', '"rows": [\n' + ",\n".join(lines) + "]"
    )


def _problem_entry(problem: Problem) -> dict[str, Any]:
    losses = {}
    for name, loss in problem.losses.items():
        truth, limit = exact_gradient(problem, loss), straight_through_limit(problem, loss)
        losses[name] = {
            "gradient": [_short(x) for x in truth.tolist()],
            "straight_through_limit_relative_bias": _short(float((limit - truth).norm() / truth.norm())),
        }
    return {"name": problem.name, "scores": [[_short(x) for x in row] for row in problem.scores.tolist()], **losses}


def _lines(study: Study) -> list[list[Any]]:
    lines = []
    for problem, loss, results in study.cases():
        for setting, q in results.items():
            bias = (_short(x / q.scale) for x in (q.bias, q.bias_low, q.bias_high))
            numbers = (q.estimates, *bias, _short(q.variance / q.scale**2), _short(q.cosine))
            lines.append([problem.name, loss, setting.arm, setting.tau, setting.samples, setting.baseline, *numbers])
    return lines


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def shown_problems(study: Study) -> list[Problem]:
    """One row and two rows, for table and plots: the row with as many keys as the stacked ones if there is one."""
    stacked = study.problems[-1]
    single = [problem for problem in study.problems if problem.rows == 1 and not problem.of_weights]
    fitting = [problem for problem in single if problem.keys == stacked.keys]
    return [(fitting or single)[0], stacked]


def table(study: Study, relations: Sequence[Relation]) -> str:
    """The relations, and all settings of the shown problems, as Markdown."""
    lines = ["## Relations", ""]
    lines += [f"- {r.name}: **{r.verdict}**; {r.numbers}" for r in relations]
    lines += ["", "## Estimators", "", NOTE]
    for problem in shown_problems(study):
        lines += [f"### {problem.name.capitalize()}", "", *_problem_table(study, problem), ""]
    return "\n".join(lines)


def _problem_table(study: Study, problem: Problem) -> list[str]:
    names = list(problem.losses)
    heads = ["estimator", *(f"{name}: bias, variance, cosine" for name in names)]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * len(names) + "|"]
    results = [study.results[problem.name, name] for name in names]
    for setting in results[0]:
        if setting.baseline is None or setting.baseline in BASELINES:
            cells = [_cell(by_loss[setting]) for by_loss in results]
            lines.append(f"| {setting} | {' | '.join(cells)} |")
    return lines


def _cell(q: Quality) -> str:
    bias = f"{q.relative_bias:.3f}"
    if q.estimates == 1:
        return f"{bias}, 0, {q.cosine:.3f}"
    interval = f" [{q.bias_low / q.scale:.3f}, {q.bias_high / q.scale:.3f}]"
    return f"{bias}{interval}, {q.variance / q.scale**2:.3g}, {q.cosine:.3f}"


def plot_bias(study: Study) -> Figure:
    """Relative bias against tau, with straight-through's limit; panels by problem and loss."""
    figure, panels = _panels(study)
    for axes, problem, loss in panels:
        results = study.results[problem.name, loss]
        for key, style in _STYLES.items():
            if key[0] != "gumbel-rao":
                _bias_line(axes, _by_tau(results, key), style, " ".join(key[:1]))
        truth = exact_gradient(problem, problem.losses[loss])
        limit = straight_through_limit(problem, problem.losses[loss])
        relative = float((limit - truth).norm() / truth.norm())
        axes.axhline(max(relative, _FLOOR), color="0.5", linewidth=0.9, label="limit of gumbel-st as tau → 0")
        sampled = results[Setting("reinforce", samples=1, baseline="none")]
        note = "95% upper end for reinforce (unbiased)"
        axes.axhline(sampled.bias_high / sampled.scale, color="0.5", linestyle=(0, (1, 2)), label=note)
        axes.set_ylim(_FLOOR * 0.8, 30)
    return _finish(study, figure, panels, f"bias / length of the exact gradient (below {_FLOOR:g}: drawn there)")


def plot_variance(study: Study) -> Figure:
    """Relative variance of one estimate against tau; the score function as horizontal lines."""
    figure, panels = _panels(study)
    for axes, problem, loss in panels:
        results = study.results[problem.name, loss]
        for key, style in _STYLES.items():
            points = {tau: q for tau, q in _by_tau(results, key).items() if q.variance > 0}
            if points:
                arm, samples = key
                label = arm + (f", K={samples}" if arm == "gumbel-rao" else "")
                values = [q.variance / q.scale**2 for q in points.values()]
                axes.plot(list(points), values, **{"markersize": 5, "linewidth": 1.1, **style}, label=label)
        for (baseline, samples), style in _SCORE_LINES.items():
            quality = results.get(Setting("reinforce", samples=samples, baseline=baseline))
            if quality is not None:
                label = f"reinforce, K={samples}, baseline {baseline}"
                axes.axhline(quality.variance / quality.scale**2, color="0.5", **style, label=label)
    panels[0][0].set_ylim(_LOWEST_VARIANCE, _HIGHEST_VARIANCE)
    return _finish(study, figure, panels, "variance of one estimate / squared length of the exact gradient")


def _panels(study: Study) -> tuple[Figure, list[tuple[Axes, Problem, str]]]:
    problems = shown_problems(study)
    names = list(problems[0].losses)
    figure = Figure(figsize=(2.9 * len(names), 2.9 * len(problems) + 0.9), layout="constrained")
    grid = figure.subplots(len(problems), len(names), sharex=True, sharey=True, squeeze=False)
    panels = []
    for line, problem in zip(grid, problems, strict=True):
        for axes, name in zip(line, names, strict=True):
            axes.set_title(f"{problem.name}: {name} loss", fontsize=9)
            panels.append((axes, problem, name))
    return figure, panels


def _finish(study: Study, figure: Figure, panels: list[tuple[Axes, Problem, str]], label: str) -> Figure:
    for axes, _, _ in panels:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.set_xticks(study.plan.taus)
        axes.tick_params(labelsize=8)
        axes.grid(color="0.92")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, handlelength=3.2)
    figure.supxlabel("temperature tau", fontsize=9)
    figure.supylabel(label, fontsize=9)
    return figure


def _bias_line(axes: Axes, points: dict[float, Quality], style: dict[str, Any], label: str) -> None:
    if not points:
        return
    middle = [max(q.relative_bias, _FLOOR) for q in points.values()]
    low = [max(q.bias_low / q.scale, _FLOOR / 10) for q in points.values()]
    high = [max(q.bias_high / q.scale, _FLOOR) for q in points.values()]
    spread = [
        [m - x for m, x in zip(middle, low, strict=True)],
        [x - m for m, x in zip(middle, high, strict=True)],
    ]
    if math.isclose(sum(high), sum(low)):
        axes.plot(list(points), middle, **{"markersize": 5, "linewidth": 1.1, **style}, label=label)
        return
    spread = [[max(x, 0.0) for x in side] for side in spread]
    settings = {"markersize": 5, "linewidth": 1.1, "capsize": 2, **style}
    axes.errorbar(list(points), middle, yerr=spread, **settings, label=label)


def _by_tau(results: dict[Setting, Quality], key: tuple[str, int]) -> dict[float, Quality]:
    found = by_arm(results, key[0], samples=key[1])
    return {setting.tau: quality for setting, quality in found.items() if setting.tau is not None}
