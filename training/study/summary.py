"""Tables, statistics and the plot of an ablation study."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from scipy import stats

from harness.errors import UsageError
from harness.evaluation import NOISE_OFF, NOISE_ON
from harness.results import write_atomically
from study.plan import Study
from study.rows import is_row, load_row

TABLE_FILE = "table.md"
SUMMARY_FILE = "summary.json"
_MODES = {NOISE_OFF: "noise off", NOISE_ON: "noise on"}
_OFFSETS = {NOISE_OFF: -0.14, NOISE_ON: 0.14}
_MARKERS = {NOISE_OFF: ("o", "black"), NOISE_ON: ("s", "white")}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds; ``half_width`` is that of its 95% t-interval, None for fewer than two seeds."""

    values: tuple[float, ...]
    mean: float
    half_width: float | None

    def __str__(self) -> str:
        spread = "" if self.half_width is None else f" ± {self.half_width:.4f}"
        return f"{self.mean:.4f}{spread}"


@dataclasses.dataclass(frozen=True)
class ArmSummary:
    """What the finished runs of an arm say; a mode nobody evaluated is missing from ``metric``."""

    arm: str
    seeds: tuple[int, ...]
    metric: dict[str, Estimate]
    train_seconds: float | None


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean and Student-t interval: half width t(n-1) * s / sqrt(n).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("an estimate needs at least one value, got none.")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(tuple(values), mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    return Estimate(tuple(values), mean, quantile * math.sqrt(variance / count))


def summarize(study: Study) -> list[ArmSummary]:
    """One summary per arm, from the finished runs of the study."""
    return [_summarize_arm(study, arm) for arm in study.arms]


def write_report(study: Study) -> list[ArmSummary]:
    """Writes table.md, summary.json and the plot from the runs finished so far."""
    summaries = summarize(study)
    study.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(study.output_dir / TABLE_FILE, table(summaries, study.metric))
    content = {"metric": study.metric, "confidence": 0.95, "arms": [dataclasses.asdict(item) for item in summaries]}
    write_atomically(study.output_dir / SUMMARY_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")
    if any(item.seeds for item in summaries):
        plot(summaries, study.metric).savefig(study.output_dir / f"{study.metric}.png", dpi=150)
    return summaries


def table(summaries: Sequence[ArmSummary], metric: str = "accuracy") -> str:
    """The summaries as a Markdown table."""
    heads = ["arm", "seeds", *(f"{_words(metric)}, {text}" for text in _MODES.values()), "train time per run (s)"]
    rows = [_row(item) for item in summaries]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(['---'] + ['---:'] * (len(heads) - 1))}|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    note = f"Mean {_words(metric)} at the last step over the seeds, ± half width of the 95% t-interval over seeds."
    return "\n".join([*lines, "", note, ""])


def plot(summaries: Sequence[ArmSummary], metric: str = "accuracy") -> Figure:
    """Means with 95% intervals and the single seeds as dots; filled is noise off, hollow is noise on."""
    figure = Figure(figsize=(1.6 + 1.4 * len(summaries), 4.0), layout="constrained")
    axes = figure.subplots()
    for mode, text in _MODES.items():
        points = [
            (index + _OFFSETS[mode], item.metric[mode]) for index, item in enumerate(summaries) if mode in item.metric
        ]
        if not points:
            continue
        marker, fill = _MARKERS[mode]
        axes.errorbar(
            [x for x, _ in points],
            [value.mean for _, value in points],
            yerr=[math.nan if value.half_width is None else value.half_width for _, value in points],
            color="black",
            linestyle="none",
            capsize=5,
            markersize=8,
            marker=marker,
            markerfacecolor=fill,
            label=f"{text}, mean and 95% interval",
        )
        seeds = [(x + 0.09, single) for x, value in points for single in value.values]
        axes.plot(*zip(*seeds, strict=True), linestyle="none", marker=".", color="0.45", markersize=6)
    axes.plot([], [], linestyle="none", marker=".", color="0.45", label="single seed")
    axes.set_xticks(range(len(summaries)), [f"{item.arm}\n(n={len(item.seeds)})" for item in summaries])
    axes.set_xlim(-0.5, len(summaries) - 0.5)
    axes.set_xlabel("arm (n: finished seeds)")
    axes.set_ylabel(f"validation {_words(metric)}")
    axes.grid(axis="y", color="0.9")
    figure.legend(loc="outside upper center", ncols=1, fontsize="small")
    return figure


def _summarize_arm(study: Study, arm: str) -> ArmSummary:
    runs = [run for run in study.runs if run.arm == arm]
    finished = {run.seed: load_row(run.row).content for run in runs if is_row(run.row)}
    metric = {}
    for mode in _MODES:
        values = [_value(results, mode, study.metric) for results in finished.values() if mode in results["final"]]
        if values:
            metric[mode] = estimate(values)
    seconds = [results["train_seconds"] for results in finished.values()]
    return ArmSummary(arm, tuple(finished), metric, math.fsum(seconds) / len(seconds) if seconds else None)


def _value(results: dict[str, Any], mode: str, metric: str) -> float:
    metrics: dict[str, float] = results["final"][mode]
    if metric not in metrics:
        raise UsageError(f"metric: the runs have no {metric!r}, they have {', '.join(metrics)}.")
    return metrics[metric]


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _row(item: ArmSummary) -> list[str]:
    metrics = [str(item.metric[mode]) if mode in item.metric else "-" for mode in _MODES]
    seconds = "-" if item.train_seconds is None else f"{item.train_seconds:.1f}"
    return [item.arm, str(len(item.seeds)), *metrics, seconds]
