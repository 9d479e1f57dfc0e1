"""What a benchmark found: its JSON, its tables, its plot."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.agreement import Verdict
from harness.results import environment, write_atomically
from harness.targets import PRESETS, Target
from harness.timing import Ratio, Timing
from harness.training_step import UNPATCHED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JSON_FILE, TABLE_FILE, PLOT_FILE = "benchmark.json", "table.md", "benchmark.png"
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Shape:
    """What was timed: lengths, head dimensions, causal or not."""

    length: int
    head_dim: int
    causal: bool = False

    def __str__(self) -> str:
        return f"N={self.length}, d={self.head_dim}{', causal' if self.causal else ''}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure: a method's time or extra bytes on one shape."""

    method: str
    shape: Shape
    direction: str
    value: Timing | int


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A figure that is not there, and why."""

    method: str
    shape: Shape
    direction: str
    reason: str
    detail: str = ""


@dataclasses.dataclass
class Report:
    """All figures so far; ``save`` writes them, so a run that is cut off loses nothing.

    Attributes:
        settings: the command line's.
        baseline: what ratios are taken to.
        checked: the verdicts of the comparisons with the reference.
        absent: methods that cannot run here at all, with the reason.
        not_done: parts of the run that are missing as a whole, with the reason.
    """

    settings: dict[str, Any]
    device: torch.device
    baseline: str
    absent: dict[str, str]
    checked: list[Verdict] = dataclasses.field(default_factory=list)
    times: list[Row] = dataclasses.field(default_factory=list)
    memory: list[Row] = dataclasses.field(default_factory=list)
    steps: dict[str, Timing] = dataclasses.field(default_factory=dict)
    left_out: list[LeftOut] = dataclasses.field(default_factory=list)
    not_done: dict[str, str] = dataclasses.field(default_factory=dict)
    finished: bool = False

    @property
    def wrong(self) -> list[Verdict]:
        """The comparisons that failed."""
        return [verdict for verdict in self.checked if verdict.wrong is not None]

    def times_of(self, shape: Shape, direction: str) -> dict[str, Timing]:
        """The timings on one shape, by method."""
        found = (row for row in self.times if row.shape == shape and row.direction == direction)
        return {row.method: row.value for row in found if isinstance(row.value, Timing)}

    def ratio(self, target: Target) -> Ratio | None:
        """The figure of a target; None where one of its two methods was not measured."""
        shape, methods = Shape(target.length, target.head_dim), (target.method, target.over)
        if target.kind == "memory":
            held = {r.method: r.value for r in self.memory if r.shape == shape and r.direction == target.direction}
            mine, other = (held.get(method) for method in methods)
            if not isinstance(mine, int) or not isinstance(other, int):
                return None
            return Ratio(*[mine / max(other, 1)] * 3)
        timings = self.steps if target.kind == "step" else self.times_of(shape, target.direction)
        mine, other = (timings.get(method) for method in methods)
        if mine is None or other is None:
            return None
        return other.over(mine) if target.faster else mine.over(other)

    def save(self) -> str:
        """Writes JSON and tables, whole or not at all.

        Returns:
            The tables.
        """
        folder = Path(self.settings["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        found = environment(self.device, 1)
        found["git"] = found["git"] or {"commit": self.settings["commit"], "dirty": None}
        found["versions"] |= {name: _version(name) for name in ("triton", "x-transformers")}
        content = {
            "settings": self.settings,
            "finished": self.finished,
            **found,
            "machine": machine(self.device),
            "baseline": self.baseline,
            "checks": [dataclasses.asdict(verdict) for verdict in self.checked],
            "wrong": [str(verdict) for verdict in self.wrong],
            "absent": self.absent,
            "left_out": [dataclasses.asdict(cell) for cell in self.left_out],
            "not_done": self.not_done,
            "times": [self._time_entry(row) for row in self.times],
            "memory": [
                {"method": r.method, **dataclasses.asdict(r.shape), "direction": r.direction, "extra_bytes": r.value}
                for r in self.memory
            ],
            "training_step": {name: _timing_entry(timing) for name, timing in self.steps.items()},
            "targets": [self._target_entry(target) for target in self.targets],
        }
        write_atomically(folder / JSON_FILE, json.dumps(content, indent=1) + "\n")
        text = "\n".join(part for part in self._tables(content) if part)
        write_atomically(folder / TABLE_FILE, text)
        return text

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets of the preset that was run."""
        preset = self.settings["preset"]
        return () if preset is None else PRESETS[preset].targets

    def _time_entry(self, row: Row) -> dict[str, Any]:
        assert isinstance(row.value, Timing)
        ratio = row.value.over(self.times_of(row.shape, row.direction)[self.baseline])
        entry = {"method": row.method, **dataclasses.asdict(row.shape), "direction": row.direction}
        return {**entry, **_timing_entry(row.value), "over_baseline": dataclasses.asdict(ratio)}

    def _target_entry(self, target: Target) -> dict[str, Any]:
        ratio = self.ratio(target)
        measured = None if ratio is None else dataclasses.asdict(ratio)
        met = None if ratio is None else target.met(ratio.median)
        return {"what": target.what, **dataclasses.asdict(target), "measured": measured, "met": met}

    def _tables(self, content: dict[str, Any]) -> list[str]:
        return [
            _list("WRONG, and not timed in that dtype and head dimension", content["wrong"]),
            self._target_table(),
            *(self._table(direction, self.times) for direction in dict.fromkeys(r.direction for r in self.times)),
            *(self._table(direction, self.memory) for direction in dict.fromkeys(r.direction for r in self.memory)),
            self._step_table(),
            self._note(content),
        ]

    def _table(self, direction: str, rows: list[Row]) -> str:
        """Methods down, shapes across: times as ratios, memory in MiB and as ratio."""
        rows = [row for row in rows if row.direction == direction]
        shapes = sorted({row.shape for row in rows}, key=dataclasses.astuple)
        cells = {(row.method, row.shape): row.value for row in rows}
        what = "time" if isinstance(rows[0].value, Timing) else "extra MiB, and"
        return _markdown(
            [f"{what} over {self.baseline}, {direction}", *map(str, shapes)],
            [
                [method, *(_cell(cells.get((method, shape)), cells.get((self.baseline, shape))) for shape in shapes)]
                for method in dict.fromkeys(row.method for row in rows)
            ],
        )

    def _target_table(self) -> str:
        lines = []
        for target in self.targets:
            ratio, sign = self.ratio(target), ">=" if target.faster else "<="
            bar = f"{sign} {target.bar:g}" + ("" if target.aim is None else f" (aim {target.aim:g})")
            met = "not measured" if ratio is None else ("met" if target.met(ratio.median) else "MISSED")
            lines.append([target.what, "-" if ratio is None else str(ratio), bar, met])
        return _markdown(["target", "measured", "bar", ""], lines) if lines else ""

    def _step_table(self) -> str:
        if not self.steps:
            return ""
        settings = self.settings
        title = f"training step of {settings['model']}, {settings['model_batch']} x {settings['model_length']}"
        base = self.steps[UNPATCHED]
        lines = [[name, str(t.over(base)), f"{t.seconds * 1e3:.1f}"] for name, t in self.steps.items()]
        return _markdown([title, f"over {UNPATCHED}", "ms"], lines)

    def _note(self, content: dict[str, Any]) -> str:
        settings, versions = content["settings"], content["versions"]
        note = (
            f"Median of the ratios within a round, and their quartiles; {settings['rounds']} interleaved rounds; "
            f"{settings['heads']} heads, {settings['dtype']}; {content['device']}, {content['num_threads']} threads, "
            f"torch {versions['torch']}. Smaller is faster. Extra memory: the most that one run holds beyond its "
            f"inputs, results included; {settings['memory_heads']} heads.\n"
        )
        absent = [f"{name}: {reason}" for name, reason in content["absent"].items()]
        cells: dict[tuple[str, str], list[str]] = {}
        for cell in self.left_out:
            cells.setdefault((cell.method, cell.reason), []).append(f"{cell.direction} {cell.shape}")
        left_out = [f"{method}, {reason}: {'; '.join(where)}" for (method, reason), where in cells.items()]
        not_done = [f"{part}: {reason}" for part, reason in content["not_done"].items()]
        unfinished = "" if self.finished else "This run has not finished.\n"
        lists = (_list("Cannot run here", absent), _list("Left out", left_out), _list("Not done", not_done))
        return "\n".join(part for part in (unfinished, note, *lists) if part)


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, and the GPU's properties that speed depends on."""
    found: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def plot(report: Report) -> Figure:
    """Ratios of every method: a row of panels for each direction, a column for each shape."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    directions = list(dict.fromkeys(row.direction for row in report.times))
    shapes = sorted({row.shape for row in report.times}, key=dataclasses.astuple)
    methods = [name for name in dict.fromkeys(row.method for row in report.times) if name != report.baseline]
    size = (2.2 + 2.5 * len(shapes), 0.8 + (0.7 + 0.24 * len(methods)) * len(directions))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(directions), len(shapes), sharex=True, sharey=True, squeeze=False)
    for i, direction in enumerate(directions):
        for j, shape in enumerate(shapes):
            axis, timings = panels[i, j], report.times_of(shape, direction)
            axis.set_title(f"{direction},\n{shape}", fontsize=8)
            for method, timing in timings.items():
                if method != report.baseline:
                    ratio, y = timing.over(timings[report.baseline]), methods.index(method)
                    axis.plot([ratio.low, ratio.high], [y, y], color="0.4", linewidth=2)
                    axis.plot(ratio.median, y, "o", color="black", markersize=4)
            axis.axvline(1.0, color="0.6", linestyle=":")
            axis.tick_params(labelsize=8)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(axis="x", color="0.92")
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].invert_yaxis()
    figure.supxlabel(f"time over {report.baseline} (log scale; dotted: equal)", fontsize=9)
    return figure


def _timing_entry(timing: Timing) -> dict[str, Any]:
    return {"seconds": timing.seconds, "samples": timing.samples}


def _cell(value: Timing | int | None, baseline: Timing | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, Timing):
        return str(value.over(baseline)) if isinstance(baseline, Timing) else "-"
    over = f" ({value / max(baseline, 1):.2f})" if isinstance(baseline, int) else ""
    return f"{value / MIB:.1f}{over}"


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|---" + "|---:" * (len(head) - 1) + "|", *rows[1:], ""])


def _list(title: str, lines: list[str]) -> str:
    return "\n".join([f"{title}:\n", *(f"- {line}" for line in lines), ""]) if lines else ""


def _processor() -> str:
    try:
        match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
