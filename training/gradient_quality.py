"""Bias and variance of every gradient estimator of a hard choice, against gradients that can be enumerated.

Rows of attention over a few keys, alone and stacked, with linear, quadratic, cubic and MLP losses: the expected loss
of the hard choice is a sum over all outcomes, and so is its gradient. Every estimator of the library is sampled on
them; the known relations between estimators are looked up in the results. A few minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from harness.gradient_relations import relations
from harness.gradient_report import plot_bias, plot_variance, results_json, table
from harness.gradient_study import Plan, Study, run_study
from harness.gradient_verdicts import Relation
from harness.results import environment, write_atomically

QUICK = Plan(sizes=(2,), weight_size=3, stacked_size=3, taus=(0.1, 0.5, 1.0, 2.0), samples=(1, 10), count=4_000)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Bias and variance of gradient estimators against enumerated gradients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gradient_quality"), help="results folder")
    parser.add_argument("--seed", type=int, default=0, help="of problems and noise")
    parser.add_argument("--samples", type=int, help=f"choices for each setting; {Plan.count}, {QUICK.count} if quick")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller problems, for a first look")
    args = parser.parse_args(argv)
    if args.samples is not None and args.samples < 1000:
        parser.error(f"--samples: expected at least 1000, got {args.samples}")
    return args


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan that the command line asks for."""
    base = QUICK if args.quick else Plan()
    return base.changed(seed=args.seed, count=base.count if args.samples is None else args.samples)


def write_report(study: Study, found: Sequence[Relation], args: argparse.Namespace, seconds: float) -> None:
    """Writes results.json, table.md, bias.png and variance.png."""
    settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
    head = {
        "command": _command(args),
        "settings": settings,
        **environment(torch.device("cpu"), 1),
        "seconds": round(seconds, 1),
    }
    write_atomically(args.output_dir / "results.json", results_json(study, found, head) + "\n")
    write_atomically(args.output_dir / "table.md", table(study, found))
    plot_bias(study).savefig(args.output_dir / "bias.png", dpi=100)
    plot_variance(study).savefig(args.output_dir / "variance.png", dpi=100)


def _command(args: argparse.Namespace) -> str:
    """The command line that repeats the run, wherever it writes to."""
    samples = "" if args.samples is None else f" --samples {args.samples}"
    return f"python training/gradient_quality.py --seed {args.seed}{samples}{' --quick' if args.quick else ''}"


def main(argv: Sequence[str] | None = None) -> tuple[Study, list[Relation]]:
    """Runs the comparison and returns what was sampled and which relations hold."""
    args = parse_args(argv)
    start = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    study = run_study(make_plan(args))
    found = relations(study)
    write_report(study, found, args, time.perf_counter() - start)
    print(*found, sep="\n")
    print(f"\nTable and plots: {args.output_dir}")
    return study, found


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread
    main()
