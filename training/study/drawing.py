"""Kinds of plots that read without colour: arms have line styles and markers, modes have markers."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy
from PIL import Image

from study.findings import Estimate

ARM_MARKERS = "osv^D*XPhp<>"
_LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MODE_MARKERS = (
    ("o", "full"),
    ("o", "none"),
    ("^", "none"),
    ("^", "full"),
    ("D", "full"),
    ("D", "none"),
    ("v", "full"),
)
_GREYS = 24
DPI = 130
SINGLE = "single seed"


def arm_style(index: int) -> dict[str, Any]:
    """Line and marker of the arm of that number; 84 arms differ, filled ones come first."""
    fill = "full" if (index // len(ARM_MARKERS)) % 2 == 0 else "none"
    return {
        "linestyle": _LINES[index % len(_LINES)],
        "marker": ARM_MARKERS[index % len(ARM_MARKERS)],
        "fillstyle": fill,
        "color": "black" if index % 2 == 0 else "0.45",
    }


def draw_dots(
    axes: Axes, names: Sequence[str], series: Mapping[str, Sequence[Estimate | None]], label: str, order: Sequence[str]
) -> None:
    """Arms below each other: means with intervals, single seeds as dots below them.

    Args:
        axes: to draw on.
        names: the arms.
        series: name of a mode -> an estimate for each arm, None where there is none.
        label: of the values.
        order: all modes of the study, so that a mode has the same marker in all its plots.
    """
    step = 0.8 / len(series)
    for number, (mode, estimates) in enumerate(series.items()):
        marker, fill = _MODE_MARKERS[order.index(mode) % len(_MODE_MARKERS)]
        offset = (number - (len(series) - 1) / 2) * step
        points = [(index + offset, found) for index, found in enumerate(estimates) if found is not None]
        axes.errorbar(
            [found.mean for _, found in points],
            [y for y, _ in points],
            xerr=[math.nan if found.half_width is None else found.half_width for _, found in points],
            color="black",
            linestyle="none",
            capsize=3,
            marker=marker,
            fillstyle=fill,
            markersize=6,
            label=mode,
        )
        seeds = [(value, y + 0.33 * step) for y, found in points for value in found.values]
        axes.plot(*zip(*seeds, strict=True), linestyle="none", marker=".", color="0.45", markersize=4)
    axes.plot([], [], linestyle="none", marker=".", color="0.45", label=SINGLE)
    for index in range(1, len(names)):
        axes.axhline(index - 0.5, color="0.9", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="x", color="0.9")


def draw_curves(
    axes: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], order: Sequence[str]
) -> None:
    """A line for each arm.

    Args:
        axes: to draw on.
        curves: arm -> places and values.
        order: all arms of the study, so that an arm has the same style in all its plots.
    """
    for number, (name, (x, y)) in enumerate(curves.items()):
        every = max(len(x) // 8, 1)
        axes.plot(
            x,
            y,
            label=name,
            linewidth=1.1,
            markersize=4.5,
            markevery=(number % every, every),
            **arm_style(order.index(name)),
        )
    axes.grid(color="0.9")


def draw_estimates(
    axes: Axes, points: Mapping[str, Sequence[tuple[float, Estimate]]], order: Sequence[str], joined: bool = True
) -> None:
    """A line through means with intervals for each name, single seeds as dots.

    Args:
        axes: to draw on.
        points: name -> (place, estimate).
        order: all names, which decides the styles.
        joined: whether there are lines.
    """
    for name, found in points.items():
        style = arm_style(order.index(name)) | ({} if joined else {"linestyle": "none"})
        axes.errorbar(
            [x for x, _ in found],
            [value.mean for _, value in found],
            yerr=[math.nan if value.half_width is None else value.half_width for _, value in found],
            label=name,
            capsize=3,
            markersize=6,
            linewidth=1.1,
            **style,
        )
        beside = offset_copy(axes.transData, axes.figure, x=5, units="points")
        for x, value in found:
            axes.plot([x] * len(value.values), value.values, ".", color="0.45", markersize=4, transform=beside)
            axes.update_datalim([(x, single) for single in value.values])  # dots beside their place do not count in it
    axes.autoscale_view()
    axes.grid(axis="y", color="0.9")


def draw_bars(axes: Axes, names: Sequence[str], values: Sequence[Sequence[float]], label: str) -> None:
    """A hatched bar for each arm's mean, single seeds as dots."""
    for index, own in enumerate(values):
        if own:
            mean = math.fsum(own) / len(own)
            axes.barh(index, mean, height=0.6, color="white", edgecolor="black", hatch="//")
            axes.plot(own, [index] * len(own), linestyle="none", marker="o", color="black", markersize=3.5)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    """The figure as a PNG of few greys: small, and what is seen is what is printed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    with Image.open(buffer) as image:
        grey = image.convert("L").quantize(_GREYS)
    small = io.BytesIO()
    grey.save(small, format="png", optimize=True)
    return small.getvalue()
