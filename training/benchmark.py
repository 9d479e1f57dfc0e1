"""Times attention against torch's own: one table, one plot, one JSON.

    python training/benchmark.py [--preset cpu | h100] [--lengths 512 2048] [--head_dims 64 128] [--heads 16]
        [--causal [N ...]] [--rounds 9] [--dtype float32] [--memory_lengths 16384] [--model minilm]
        [--output_dir results/benchmark]

Every implementation of this library that can run here, softmax and Gumbel attention as they are usually written,
x-transformers' where it is installed, and torch's scaled_dot_product_attention, forward and forward + backward,
interleaved in one process. Figures are medians of ratios to scaled_dot_product_attention (its flash attention where
that runs), with quartiles. Before anything is timed, every implementation is compared with the reference; one that
disagrees is named and not timed. What does not fit in memory or in time is left out and named. With --memory_lengths,
the memory that a run takes; with --model, a whole training step of it, patched against unpatched.

A preset sets all options, which may still be given, and puts each figure that has a target next to it. The JSON and
the tables are written again after every shape.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from harness.agreement import check
from harness.benchmark_report import PLOT_FILE, LeftOut, Report, Row, Shape, plot
from harness.contenders import Contender, find_contenders
from harness.errors import UsageError
from harness.fresh import ProcessError
from harness.memory import contender_memory, free_bytes, random_inputs, run_of
from harness.targets import BOTH, FORWARD, PRESETS
from harness.timing import OUT_OF_MEMORY, TOO_SLOW, compare, reason_of
from harness.training_step import PATCHED_ARMS, UNPATCHED, training_steps

CHECK_LENGTH = 512
SAMPLE_SECONDS = 0.01
NO_FIT = "would not fit in half of the memory that is free"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        Exit status: 0, or 1 if an implementation was wrong.
    """
    options = parse_options(argv)
    benchmark = Benchmark(options)
    benchmark.check()
    for shape in shapes(options):
        benchmark.time(shape)
    benchmark.measure_memory()
    benchmark.time_steps()
    benchmark.finish()
    return 1 if benchmark.report.wrong else 0


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; a preset's settings become its defaults."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=list(PRESETS), help="settings and targets for a kind of machine")
    preset = first.parse_known_args(argv)[0].preset
    parser = argparse.ArgumentParser(
        description="Times attention.", formatter_class=argparse.ArgumentDefaultsHelpFormatter, parents=[first]
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[512, 2048], help="sequence lengths, in the order of measurement")
    add("--head_dims", type=int, nargs="+", default=[64, 128], help="head dimensions")
    add("--heads", type=int, default=16, help="heads of the one example")
    add("--causal", type=int, nargs="*", help="causal attention too, at these lengths; at all if none is given")
    add("--methods", nargs="+", default=["*"], help="patterns of the methods to measure, such as 'cpu *'")
    add("--rounds", type=int, default=9, help="times each method is sampled")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the inputs")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--time_limit", type=float, default=120.0, help="seconds for the rounds of one method on one shape")
    add("--total_limit", type=float, default=3600.0, help="seconds after which no further shape is timed")
    add("--check_dtypes", nargs="*", default=[], help="dtypes to compare with the reference besides --dtype")
    add("--check_processes", type=int, default=0, help="processes that compare at once; 0: this one, by turns")
    add("--memory_lengths", type=int, nargs="*", default=[], help="lengths at which to measure memory")
    add("--memory_heads", type=int, default=1, help="heads when measuring memory; head dimension: the first")
    add("--model", help="also time a training step of this model: minilm, bert-base-shape, a folder")
    add("--model_batch", type=int, default=8, help="examples in that step")
    add("--model_length", type=int, default=128, help="tokens in each of them")
    add("--commit", help="what the results name as commit where this folder is no git checkout")
    add("--output_dir", default="results/benchmark", help="where the results go")
    if preset is not None:
        parser.set_defaults(**PRESETS[preset].settings)
    options = parser.parse_args(argv)
    if options.rounds < 3:
        parser.error(f"--rounds must be at least 3, got {options.rounds}")
    torch.set_num_threads(options.threads)
    return options


def shapes(options: argparse.Namespace) -> list[Shape]:
    """What to time, in this order."""
    causal_at = options.lengths if options.causal == [] else options.causal or []
    return [
        Shape(length, head_dim, causal)
        for length in options.lengths
        for causal in ((False, True) if length in causal_at else (False,))
        for head_dim in options.head_dims
    ]


class Benchmark:
    """One run: what it measures with, and its report so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype: torch.dtype = getattr(torch, options.dtype)
        self.start = time.monotonic()
        torch.manual_seed(0)
        field = find_contenders(self.device, self.dtype)
        self.contenders = [
            contender
            for contender in field.contenders
            if contender.name == field.baseline or any(fnmatch.fnmatch(contender.name, p) for p in options.methods)
        ]
        self.single: dict[tuple[str, str], tuple[Shape, float]] = {}
        self.report = Report(dict(vars(options)), self.device, field.baseline, field.absent)

    def check(self) -> None:
        """Compares the implementations with the reference."""
        options = self.options
        methods = [contender.ours for contender in self.contenders if contender.ours is not None]
        others = [getattr(torch, name) for name in options.check_dtypes if name != options.dtype]
        self.report.checked = check(
            methods, self.device, [self.dtype, *others], options.head_dims, CHECK_LENGTH, options.check_processes
        )
        for verdict in self.report.wrong:
            print(f"WRONG: {verdict}", file=sys.stderr)
        self._done(f"{len(self.report.checked)} comparisons with the reference, {len(self.report.wrong)} wrong")

    def time(self, shape: Shape) -> None:
        """Times all methods on one shape, forward and forward + backward."""
        report, options = self.report, self.options
        if time.monotonic() - self.start > options.total_limit:
            report.not_done[f"times of {shape}"] = f"more than {options.total_limit:g} s had passed"
            return
        inputs = random_inputs(options.heads, shape.length, shape.head_dim, self.device, self.dtype)
        fitting = self._fitting(shape, options.heads, (FORWARD, BOTH))
        for direction in (FORWARD, BOTH):
            runs = {}
            for contender in fitting:
                if self._expected(contender.name, direction, shape) * options.rounds > options.time_limit:
                    report.left_out.append(LeftOut(contender.name, shape, direction, TOO_SLOW, "as shorter ones were"))
                else:
                    runs[contender.name] = run_of(contender.attention, direction, inputs, shape.causal)
            if report.baseline in runs:
                found = compare(runs, options.rounds, self.device, options.time_limit, SAMPLE_SECONDS)
                self.single |= {(name, direction): (shape, once) for name, once in found.single.items()}
                report.left_out += [LeftOut(name, shape, direction, why) for name, why in found.left_out.items()]
                if report.baseline in found.timings:
                    rows = found.timings.items()
                    report.times += [Row(name, shape, direction, timing) for name, timing in rows]
                    continue
            report.not_done[f"{direction} {shape}"] = f"the baseline, {report.baseline}, is left out"
        self._done(str(shape))

    def measure_memory(self) -> None:
        """Measures the memory of all methods, at the first head dimension."""
        options = self.options
        for length in options.memory_lengths:
            shape = Shape(length, options.head_dims[0])
            for contender in self._fitting(shape, options.memory_heads, (FORWARD, BOTH)):
                for direction in (FORWARD, BOTH):
                    self._measure_memory(contender, shape, direction)
            self._done(f"memory of {shape}")

    def time_steps(self) -> None:
        """Times training steps of the model, each way of attention against the unpatched one."""
        options = self.options
        if options.model is None:
            return
        impls = {}
        if self.device.type == "cuda":  # where "auto" does not take these kernels yet
            impls = {c.ours[1]: "triton" for c in self.contenders if c.ours is not None and c.ours[0] == "triton"}
        impls.pop("softmax", None)
        wrong = {verdict.method for verdict in self.report.wrong if verdict.dtype == options.dtype}
        bad = [arm for arm in PATCHED_ARMS if f"{impls.get(arm)} {arm}" in wrong]
        for arm in bad:
            self.report.not_done[f"training step, {arm}"] = "its implementation is wrong"
        arms = [arm for arm in PATCHED_ARMS if arm not in bad]
        try:
            steps = training_steps(
                options.model, options.model_batch, options.model_length, self.device, self.dtype, impls, arms
            )
        except (UsageError, ValueError, RuntimeError) as error:
            self.report.not_done["training step"] = reason_of(error, self.device)
            return
        found = compare(steps, options.rounds, self.device)
        self.report.not_done |= {f"training step, {arm}": reason for arm, reason in found.left_out.items()}
        if UNPATCHED in found.timings:
            self.report.steps = found.timings
        self._done(f"training step of {options.model}")

    def finish(self) -> None:
        """Writes everything, and prints the tables."""
        self.report.finished = True
        folder = Path(self.options.output_dir)
        try:
            figure = plot(self.report) if self.report.times else None
        except ModuleNotFoundError as error:
            self.report.not_done["plot"] = f"{error.name} is not installed"
        else:
            folder.mkdir(parents=True, exist_ok=True)
            if figure is not None:
                figure.savefig(folder / PLOT_FILE, dpi=130)
        print(f"\n{self.report.save()}\nin {folder}")

    def _fitting(self, shape: Shape, heads: int, directions: Sequence[str]) -> list[Contender]:
        """The contenders that are right and fit in memory."""
        free = free_bytes(self.device)
        verdicts = [v for v in self.report.checked if v.dtype == self.options.dtype and v.head_dim == shape.head_dim]
        right = {v.method for v in verdicts} - {v.method for v in verdicts if v.wrong is not None}
        fitting = []
        for contender in self.contenders:
            needed = contender.bytes_needed(heads, shape.length, self.dtype)
            if contender.ours is not None and contender.name not in right:
                continue  # the list of what is wrong says so
            if needed > free / 2:
                detail = f"about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
                self.report.left_out += [LeftOut(contender.name, shape, way, NO_FIT, detail) for way in directions]
            else:
                fitting.append(contender)
        return fitting

    def _expected(self, name: str, direction: str, shape: Shape) -> float:
        """Seconds of a run, from the last one of the method: they grow with N^2 d. 0 if there was none."""
        before, seconds = self.single.get((name, direction), (shape, 0.0))
        return seconds * (shape.length / before.length) ** 2 * shape.head_dim / before.head_dim

    def _measure_memory(self, contender: Contender, shape: Shape, direction: str) -> None:
        heads = self.options.memory_heads
        try:
            extra = contender_memory(
                contender, direction, heads, shape.length, shape.head_dim, shape.causal, self.device, self.dtype
            )
        except (ProcessError, RuntimeError) as error:
            reason = reason_of(error, self.device)
            detail = "" if reason == OUT_OF_MEMORY else "while measuring memory"
            self.report.left_out.append(LeftOut(contender.name, shape, direction, reason, detail))
        else:
            self.report.memory.append(Row(contender.name, shape, direction, extra))

    def _done(self, part: str) -> None:
        self.report.save()
        print(f"{time.monotonic() - self.start:6.1f} s  {part}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
