"""Times attention against torch's own: one table, one plot, one JSON.

    python training/benchmark.py [--lengths 512 2048] [--head_dims 64 128] [--heads 16] [--rounds 9]
        [--dtype float32] [--model minilm] [--output_dir results/benchmark]

Every implementation of this library that can run here, softmax and Gumbel attention as they are usually written,
and torch's scaled_dot_product_attention, forward and forward + backward, interleaved in one process. Figures are
medians of ratios to scaled_dot_product_attention, with quartiles. An implementation whose results disagree with the
reference is named and not timed. With --model, a whole training step of it too, patched against unpatched.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

import gumbel_attention as ga
from harness.contenders import ARMS, BASELINE, Contender, contenders, disagreement
from harness.results import environment, write_atomically
from harness.timing import Timing, compare
from harness.training_step import UNPATCHED, training_steps

PASSES = ("forward", "forward+backward")
CHECK_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of the table."""

    method: str
    length: int
    head_dim: int
    direction: str
    timing: Timing


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        Exit status: 0, or 1 if an implementation was wrong.
    """
    options = parse_options(argv)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    methods = [
        method
        for method in contenders(device, dtype)
        if method.name == BASELINE or any(fnmatch.fnmatch(method.name, pattern) for pattern in options.methods)
    ]
    wrong = check(device, dtype, options.head_dims)
    for name, reason in wrong.items():
        print(f"{name}: NOT TIMED, wrong: {reason}", file=sys.stderr)
    methods = [method for method in methods if method.name not in wrong]
    rows: list[Row] = []
    for head_dim in options.head_dims:
        for length in options.lengths:
            rows += measure(methods, length, head_dim, options, device, dtype)
            print(f"N = {length}, d = {head_dim}: done", flush=True)
    steps = {} if options.model is None else measure_steps(options, device)
    write(rows, steps, wrong, options, device)
    return 1 if wrong else 0


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Times attention.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="sequence lengths")
    parser.add_argument("--head_dims", type=int, nargs="+", default=[64, 128], help="head dimensions")
    parser.add_argument("--heads", type=int, default=16, help="heads of the one example")
    parser.add_argument("--methods", nargs="+", default=["*"], help="patterns of the methods to time, such as 'cpu *'")
    parser.add_argument("--rounds", type=int, default=9, help="times each method runs")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the inputs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--quadratic_up_to", type=int, default=2048, help="longest N for methods that keep all scores")
    parser.add_argument("--model", help="also time a training step of this model, such as minilm")
    parser.add_argument("--model_batch", type=int, default=8, help="examples in that step")
    parser.add_argument("--model_length", type=int, default=128, help="tokens in each of them")
    parser.add_argument("--output_dir", type=Path, default=Path("results/benchmark"), help="where the results go")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    return options


def check(device: torch.device, dtype: torch.dtype, head_dims: Sequence[int]) -> dict[str, str]:
    """The implementations that disagree with the reference, with what is wrong."""
    wrong: dict[str, str] = {}
    for head_dim in head_dims:
        q, k, v = (torch.randn(1, 2, CHECK_LENGTH, head_dim, device=device, dtype=dtype) for _ in range(3))
        for impl in ga.dispatch.IMPLEMENTATIONS:
            for arm, settings in ARMS.items():
                try:
                    reason = disagreement(impl, settings, q, k, v)
                except ValueError:  # this implementation does not do this arm, and says so
                    continue
                if reason is not None:
                    wrong[f"{impl} {arm}"] = f"d = {head_dim}: {reason}"
    return wrong


def measure(
    methods: Sequence[Contender],
    length: int,
    head_dim: int,
    options: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Row]:
    """Times all methods on one shape, forward and forward + backward."""
    shape = (1, options.heads, length, head_dim)
    q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    fitting = [method for method in methods if not method.quadratic or length <= options.quadratic_up_to]
    rows = []
    for direction in PASSES:
        runs = {method.name: _run(method, direction, q, k, v, grad) for method in fitting}
        timings = compare(runs, BASELINE, options.rounds, device)
        rows += [Row(name, length, head_dim, direction, timing) for name, timing in timings.items()]
    return rows


def measure_steps(options: argparse.Namespace, device: torch.device) -> dict[str, Timing]:
    """Times training steps of the model, each way of attention against the unpatched one."""
    steps = training_steps(options.model, options.model_batch, options.model_length, device)
    return compare(steps, UNPATCHED, options.rounds, device)


def _run(method: Contender, direction: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Callable[[], object]:
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return method.attention(q, k, v)

        return forward
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(method.attention(*inputs), inputs, grad)


def write(
    rows: Sequence[Row],
    steps: dict[str, Timing],
    wrong: dict[str, str],
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Writes benchmark.json, table.md and benchmark.png."""
    folder: Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    content: dict[str, Any] = {
        "settings": settings,
        **environment(device, 1),
        "wrong": wrong,
        "rows": [dataclasses.asdict(row) for row in rows],
        "training_step": {name: dataclasses.asdict(timing) for name, timing in steps.items()},
    }
    write_atomically(folder / "benchmark.json", json.dumps(content, indent=1) + "\n")
    text = table(rows, content) + step_table(steps, options)
    write_atomically(folder / "table.md", text)
    plot(rows).savefig(folder / "benchmark.png", dpi=130)
    print(f"\n{text}\nin {folder}")


def table(rows: Sequence[Row], content: dict[str, Any]) -> str:
    """The rows as a Markdown table: methods down, shapes across."""
    columns = list(dict.fromkeys((row.direction, row.length, row.head_dim) for row in rows))
    cells = {(row.method, row.direction, row.length, row.head_dim): str(row.timing) for row in rows}
    lines = [
        "| time over " + BASELINE + " | " + " | ".join(f"{p}, N={n}, d={d}" for p, n, d in columns) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    lines += [
        f"| {method} | " + " | ".join(cells.get((method, *column), "-") for column in columns) + " |"
        for method in dict.fromkeys(row.method for row in rows)
    ]
    versions = content["versions"]
    note = (
        f"Median of the ratios within a round, and their quartiles; {content['settings']['rounds']} interleaved "
        f"rounds; {content['settings']['heads']} heads, {content['settings']['dtype']}; {content['device']}, "
        f"{content['num_threads']} threads, torch {versions['torch']}. Smaller is faster."
    )
    return "\n".join([*lines, "", note, ""])


def step_table(steps: dict[str, Timing], options: argparse.Namespace) -> str:
    """The training steps as a Markdown table; nothing where there are none."""
    if not steps:
        return ""
    lines = [
        "",
        f"| training step of {options.model}, {options.model_batch} x {options.model_length} | over {UNPATCHED} |",
        "|---|---:|",
        *(f"| {name} | {timing} |" for name, timing in steps.items()),
    ]
    return "\n".join([*lines, ""])


def plot(rows: Sequence[Row]) -> Figure:
    """Ratios of every method: a row of panels for each direction, a column for each shape."""
    directions = list(dict.fromkeys(row.direction for row in rows))
    shapes = list(dict.fromkeys((row.length, row.head_dim) for row in rows))
    methods = [name for name in dict.fromkeys(row.method for row in rows) if name != BASELINE]
    size = (2.2 + 2.5 * len(shapes), 0.8 + (0.7 + 0.24 * len(methods)) * len(directions))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(directions), len(shapes), sharex=True, sharey=True, squeeze=False)
    for row in rows:
        axis = panels[directions.index(row.direction), shapes.index((row.length, row.head_dim))]
        axis.set_title(f"{row.direction}, N = {row.length}, d = {row.head_dim}", fontsize=9)
        if row.method != BASELINE:
            y = methods.index(row.method)
            axis.plot([row.timing.low, row.timing.high], [y, y], color="0.4", linewidth=2)
            axis.plot(row.timing.ratio, y, "o", color="black", markersize=4)
    for axis in panels.flat:
        axis.axvline(1.0, color="0.6", linestyle=":")
        axis.tick_params(labelsize=8)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(axis="x", color="0.92")
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].invert_yaxis()
    figure.supxlabel(f"time over {BASELINE} (log scale; dotted: equal)", fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(main())
