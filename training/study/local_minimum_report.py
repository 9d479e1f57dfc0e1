"""Table and plots of the escape from a local minimum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from study.statistics import ALPHA, CONFIDENCE, holm

Row = Mapping[str, Any]
_STYLES = {
    "gumbel-soft": ("-", "o", "full"),
    "gumbel-st": ("--", "s", "full"),
    "reinforce-loo": ("-.", "v", "full"),
    "gumbel-rao": (":", "D", "full"),
    "normal-soft": ("-", "o", "none"),
    "normal-st": ("--", "s", "none"),
    "softmax-tau": (":", "x", "full"),
    "det-st": ((0, (1, 3)), "+", "full"),
}


def control_of(arm: str, schedule: str) -> tuple[str, str]:
    """The arm without noise that ``arm`` is compared with, and its schedule: the same tau."""
    name = "softmax-tau" if arm.endswith("-soft") or arm == "softmax-tau" else "det-st"
    return name, {"noise annealed": "constant", "both annealed": "tau annealed"}.get(schedule, schedule)


def interval(count: int, total: int) -> tuple[float, float]:
    """The Clopper-Pearson interval of a share."""
    found = stats.binomtest(count, total).proportion_ci(CONFIDENCE, "exact")
    return float(found.low), float(found.high)


def paired_p(row: Row, control: Row) -> float:
    """Exact McNemar test of two rows, paired by seed: two-sided p of the seeds that one of them alone escaped with."""
    pairs = [(a is None, b is None) for a, b in zip(row["steps"], control["steps"], strict=True)]
    first, second = pairs.count((False, True)), pairs.count((True, False))
    return 1.0 if first + second == 0 else float(stats.binomtest(first, first + second).pvalue)


def quartiles(steps: Sequence[int | None]) -> list[float]:
    """Lower quartile, median and upper quartile; infinite where that many seeds did not escape."""
    ordered = sorted(math.inf if step is None else float(step) for step in steps)
    return [ordered[math.ceil(share * len(ordered)) - 1] for share in (0.25, 0.5, 0.75)]


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    settings = results["settings"]
    parts = ["# Escape from an early choice that is good but not best", f"`{results['command']}`", _intro(results)]
    parts += ["## What comes out", "\n".join(f"- {line}" for line in findings(results))]
    parts.append("## Share of seeds that end at the cue (95 % Clopper-Pearson interval)")
    parts += [_share_table(results, problem) for problem in results["problems"]]
    parts.append("## Steps to the escape, at each arm's best noise scale")
    parts.append(
        "Steps: from then on the cue scores highest until the end; lower quartile, median, upper quartile over all "
        f"{settings['seeds']} seeds, '-' where that many were still elsewhere after {settings['steps']} steps. "
        "Changes: of the sentence that scores highest, mean over seeds. Elsewhere: ended neither at decoy nor cue. "
        "Accuracy: mean, noise off, on new examples, attention as the arm trains it / on the highest score alone."
    )
    parts += [_step_table(results, problem) for problem in results["problems"]]
    parts.append("\n".join(f"- `{name}`: {meaning}." for name, meaning in results["meanings"].items()))
    return "\n\n".join(parts) + "\n"


def _intro(results: Mapping[str, Any]) -> str:
    s = results["settings"]
    rates = ", ".join(f"{rate:g}" for rate in s["learning_rates"])
    return (
        f"{s['sentences']} sentences, {s['classes']} classes: the decoy is right in {s['decoy_right']:.0%} of the "
        "examples, the cue always, the others say words at random. `trap b`: the decoy's score starts b above the "
        "others and the cue speaks another language than the decoy, so that a reader of the decoy gets it wrong. "
        "`plateau b`: it speaks the same. `oracle`: `trap 4` started at the cue: does noise drive a run away from the "
        f"best choice? {s['steps']} steps of {s['batch']} examples, {s['seeds']} seeds; data and initial parameters "
        f"are the same for all arms. Adam at {rates}: chosen for each arm, noise scale, schedule and problem by the "
        f"share that ends at the cue on {s['tuning_seeds']} other seeds. tau is 1, annealed 4 to 0.5 "
        "(exponentially); noise is annealed linearly to a tenth. Noise scale 0 is the temperature alone: "
        "`softmax-tau` in the rows of soft arms, `det-st` in those of hard ones."
    )


def findings(results: Mapping[str, Any]) -> list[str]:
    """The answer for each problem in a sentence, with counts of what differs from temperature alone."""
    index = {_key(row): row for row in results["rows"]}
    noisy = [row for row in results["rows"] if row["noise_scale"] > 0]
    controls = [index[(row["problem"], *control_of(row["arm"], row["schedule"]), 0.0)] for row in noisy]
    corrected = holm([paired_p(row, control) for row, control in zip(noisy, controls, strict=True)])
    lines = []
    for problem in results["problems"]:
        signs: dict[str, list[int]] = {"softmax-tau": [], "det-st": []}
        for row, control, p in zip(noisy, controls, corrected, strict=True):
            if row["problem"] == problem:
                more = row["ended"][1] - control["ended"][1]
                signs[control["arm"]].append((more > 0) - (more < 0) if p <= ALPHA else 0)
        soft, hard = ((len(found), found.count(1), found.count(-1)) for found in signs.values())
        own = [row for row in results["rows"] if row["problem"] == problem]
        alone = max((row for row in own if row["noise_scale"] == 0), key=_share)
        noise = max((row for row in own if row["noise_scale"] > 0), key=_share)
        lines.append(
            f"**{problem}**: best share with temperature alone {_share(alone):.2f} ({_named(alone)}), best with noise "
            f"{_share(noise):.2f} ({_named(noise)}; the best of {soft[0] + hard[0]}, which flatters it). Against the "
            f"same temperature without noise, soft arms {soft[1]} of {soft[0]} settings escape more often and "
            f"{soft[2]} less often, hard arms {hard[1]} of {hard[0]} more often and {hard[2]} less often."
        )
    lines.append(
        f"More or less often: exact McNemar test, paired by seed, p at most {ALPHA} after Holm's correction over all "
        f"{len(noisy)} comparisons. The hard arms are compared with `det-st`, the soft ones with `softmax-tau`."
    )
    return lines


def _key(row: Row) -> tuple[str, str, str, float]:
    return row["problem"], row["arm"], row["schedule"], row["noise_scale"]


def _share(row: Row) -> float:
    return float(row["ended"][1] / sum(row["ended"]))


def _named(row: Row) -> str:
    noise = f", noise {row['noise_scale']:g}" if row["noise_scale"] else ""
    return f"`{row['arm']}`, {row['schedule']}{noise}"


def _series(results: Mapping[str, Any], problem: str, arm: str, schedule: str) -> list[Row]:
    """The rows of an arm by noise scale, its control first; empty if it was not run with that schedule."""
    rows = {_key(row): row for row in results["rows"]}
    own = [row for key, row in rows.items() if key[:3] == (problem, arm, schedule)]
    if not own or arm in ("reinforce-loo",):
        return own
    return [rows[(problem, *control_of(arm, schedule), 0.0)], *own]


def _noisy_arms(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in results["rows"] if row["noise_scale"] > 0))


def _share_table(results: Mapping[str, Any], problem: str) -> str:
    scales = [0.0, *results["settings"]["noise_scales"]]
    lines = [f"| {problem}: schedule | arm | " + " | ".join(f"noise {scale:g}" for scale in scales) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(scales))
    for schedule in results["schedules"]:
        for arm in _noisy_arms(results):
            rows = {row["noise_scale"]: row for row in _series(results, problem, arm, schedule)}
            if rows:
                cells = [_share_text(rows[scale]) if scale in rows else "" for scale in scales]
                lines.append(f"| {schedule} | `{arm}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share_text(row: Row) -> str:
    low, high = interval(row["ended"][1], sum(row["ended"]))
    return f"{_share(row):.2f} ({low:.2f}-{high:.2f})"


def _step_table(results: Mapping[str, Any], problem: str) -> str:
    lines = [f"| {problem}: schedule | arm | noise | learning rate | share | steps | changes | elsewhere | accuracy |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for schedule in results["schedules"]:
        for arm in results["meanings"]:
            rows = [row for row in results["rows"] if _key(row)[:3] == (problem, arm, schedule)]
            if rows:
                lines.append(f"| {schedule} | `{arm}` | {_step_text(max(rows, key=_share))} |")
    return "\n".join(lines)


def _step_text(row: Row) -> str:
    steps = " / ".join("-" if math.isinf(step) else f"{step:g}" for step in quartiles(row["steps"]))
    return (
        f"{row['noise_scale']:g} | {row['learning_rate']:g} | {_share(row):.2f} | {steps} | {row['changes']:.1f} | "
        f"{row['ended'][2]} | {row['accuracy']:.2f} / {row['hard_accuracy']:.2f}"
    )


def plot_shares(results: Mapping[str, Any]) -> Figure:
    """Escape share against noise scale: a row of panels for each problem, a column for each schedule."""
    problems, schedules = results["problems"], list(results["schedules"])
    scales = [0.0, *results["settings"]["noise_scales"]]
    figure = Figure(figsize=(11, 2.3 * len(problems) + 0.8), layout="constrained")
    grid = figure.subplots(len(problems), len(schedules), sharex=True, sharey=True, squeeze=False)
    for axes_row, problem in zip(grid, problems, strict=True):
        for axes, schedule in zip(axes_row, schedules, strict=True):
            for arm in _noisy_arms(results):
                rows = _series(results, problem, arm, schedule)
                if rows:
                    places = [scales.index(row["noise_scale"]) for row in rows]
                    _line(axes, arm, places, [_share(row) for row in rows])
            axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
            axes.set_ylim(-0.05, 1.05)
            axes.grid(alpha=0.3)
            if problem == problems[0]:
                axes.set_title(schedule)
            if problem == problems[-1]:
                axes.set_xlabel("noise scale (0: temperature alone)")
        axes_row[0].set_ylabel(f"{problem}\nshare at the cue")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=6, handlelength=4)
    return figure


def plot_trajectories(results: Mapping[str, Any]) -> Figure:
    """Share of seeds whose highest score is the cue's, over training, with the most noise."""
    problems = [problem for problem in results["problems"] if problem != "oracle"]
    schedules, scale = ("constant", "both annealed"), max(results["settings"]["noise_scales"])
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.subplots(len(schedules), len(problems), sharex=True, sharey=True, squeeze=False)
    rows = {_key(row): row for row in results["rows"]}
    for axes_row, schedule in zip(grid, schedules, strict=True):
        for axes, problem in zip(axes_row, problems, strict=True):
            for arm in results["meanings"]:
                alone = (problem, *control_of(arm, schedule), 0.0) if arm in ("softmax-tau", "det-st") else None
                row = rows.get(alone or (problem, arm, schedule, scale))
                if row is not None:
                    steps = [i * results["settings"]["every"] for i in range(len(row["trajectory"]))]
                    _line(axes, arm, steps, row["trajectory"])
            axes.grid(alpha=0.3)
            axes.set_ylim(-0.05, 1.05)
            axes.set_title(f"{problem}, {schedule}", fontsize=10)
        axes_row[0].set_ylabel("share of seeds at the cue")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    title = f"Highest score over training; noise scale {scale:g}, softmax-tau and det-st without noise"
    figure.suptitle(title, fontsize=11)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=4)
    return figure


def _line(axes: Axes, arm: str, x: Sequence[float], y: Sequence[float]) -> None:
    style, marker, fill = _STYLES[arm]
    grey = "0.55" if arm.startswith("normal") else "black"
    axes.plot(
        x,
        y,
        linestyle=style,
        marker=marker,
        fillstyle=fill,
        color=grey,
        markersize=4,
        linewidth=1.1,
        label=arm,  # type: ignore[arg-type]
    )
