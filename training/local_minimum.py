"""Does noise leave an early choice that is good but not best, where temperature alone does not?

The task and the runs are in :mod:`harness.local_minimum`. Every arm gets the same data, initial parameters and number
of steps; its learning rate is chosen for each noise scale, schedule and problem from one grid on other seeds. A run
has escaped if, at the end and with the noise off, its highest score is that of the cue.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import gumbel_attention as ga
from harness.errors import UsageError
from harness.flags import check_at_least, check_grid, end_if_refused
from harness.local_minimum import CUE, DECOY, Arm, Columns, Problem, Runs, Schedule, Sizes, fit
from harness.results import write_atomically
from study.local_minimum_report import plot_shares, plot_trajectories, table

_SCORE = {"hard": True, "estimator": "score_function"}
_RAO = {"hard": True, "estimator": "gumbel_rao", "samples": 4}
CONTROLS = {"softmax-tau": Arm("softmax-tau", "softmax(S / tau), no noise", {"noise": "none"})}
CONTROLS["det-st"] = Arm(
    "det-st", "argmax of S, gradient of softmax(S / tau), no noise", {"hard": True, "noise": "none"}
)
ARMS = {
    arm.name: arm
    for arm in (
        Arm("gumbel-soft", "relaxed sample softmax((S + c G) / tau)", {}),
        Arm("gumbel-st", "hard sample, gradient of the relaxed one", {"hard": True}),
        Arm("reinforce-loo", "hard sample, score function, baseline the mean loss of the other examples", _SCORE),
        Arm("gumbel-rao", "hard sample, gradient of the mean of 4 relaxed samples given that choice", _RAO),
        Arm("normal-soft", "as gumbel-soft with Normal noise of equal variance", {"noise": "normal"}),
        Arm("normal-st", "as gumbel-st with Normal noise of equal variance", {"hard": True, "noise": "normal"}),
    )
}
SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("constant", (1.0, 1.0)),
        Schedule("tau annealed", (4.0, 0.5)),
        Schedule("noise annealed", (1.0, 1.0), 0.1),
        Schedule("both annealed", (4.0, 0.5), 0.1),
    )
}
FEW = ("constant", "both annealed")
"""The schedules of the arms that are expensive or controls of controls."""
PROBLEMS = (
    Problem("trap", 1),
    Problem("trap", 2),
    Problem("trap", 4),
    Problem("plateau", 8),
    Problem("trap", 4, favoured=CUE),
)
_EVERY = 20
REPORTED, TUNING = 0, 1
RESULTS_FILE, TABLE_FILE = "local_minimum.json", "table.md"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Escape from an early choice that is good but not best.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("local_minimum_output"), help="results folder")
    add("--seeds", type=int, default=64, help="number of reported seeds")
    add("--tuning_seeds", type=int, default=12, help="number of other seeds, which choose the learning rate")
    add("--steps", type=int, default=300, help="the budget of steps")
    add("--noise_scales", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0, 4.0], help="beside 0, the controls")
    add("--learning_rates", type=float, nargs="+", default=[0.01, 0.03, 0.1], help="Adam's, the same grid for all")
    add("--quick", action="store_true", help="4 seeds, 20 steps, noise scale 1, one learning rate: does it run?")
    add("--redraw", action="store_true", help="table and plots again, from the numbers in the output folder")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.tuning_seeds, args.steps, args.noise_scales, args.learning_rates = 4, 2, 20, [1.0], [0.1]
    end_if_refused(parser, check_arguments, args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses settings that give no comparison.

    Raises:
        UsageError: says which setting, and what it may be.
    """
    check_at_least(args, {"seeds": 2, "tuning_seeds": 1, "steps": 2})
    check_grid(args, "noise_scales")
    check_grid(args)


def cells(noise_scales: Sequence[float]) -> list[tuple[Arm, float, Schedule]]:
    """Every arm with each of its schedules and noise scales; the controls, without noise, come first."""
    found = [
        (arm, 0.0, schedule)
        for arm in CONTROLS.values()
        for schedule in SCHEDULES.values()
        if schedule.noise_end == 1  # without noise the others are the same runs
    ]
    for arm in ARMS.values():
        own = FEW if arm.name == "gumbel-rao" or arm.name.startswith("normal") else tuple(SCHEDULES)
        found += [(arm, scale, SCHEDULES[name]) for name in own for scale in noise_scales]
    return found


def study(arm: Arm, noise_scale: float, schedule: Schedule, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one arm, noise scale and schedule, one for each problem, each at its chosen learning rate."""
    sizes, rates = Sizes(steps=args.steps), args.learning_rates
    grid = [(seed, problem, rate) for problem in PROBLEMS for rate in rates for seed in range(args.tuning_seeds)]
    tuning = fit(arm, noise_scale, schedule, Columns(*zip(*grid, strict=True)), sizes, TUNING)
    chosen = choose_rates(tuning, rates)
    reported = [(seed, p, rate) for p, rate in zip(PROBLEMS, chosen, strict=True) for seed in range(args.seeds)]
    runs = fit(arm, noise_scale, schedule, Columns(*zip(*reported, strict=True)), sizes, REPORTED)
    settings = {"arm": arm.name, "noise_scale": noise_scale, "schedule": schedule.name}
    return [
        {**settings, "problem": problem.name, "learning_rate": rate, **summarise(part)}
        for problem, rate, part in zip(PROBLEMS, chosen, split(runs, len(PROBLEMS)), strict=True)
    ]


def split(runs: Runs, parts: int) -> list[Runs]:
    """Columns in so many equal blocks."""
    return [Runs(*block) for block in zip(*(x.chunk(parts, -1) for x in runs), strict=True)]


def choose_rates(tuning: Runs, rates: Sequence[float]) -> list[float]:
    """For each problem the rate with the most runs that end at the cue, and of equal ones the sooner."""
    chosen = []
    for problem in split(tuning, len(PROBLEMS)):
        at_cue = [(part.choices == CUE).double() for part in split(problem, len(rates))]
        chosen.append(max(range(len(rates)), key=lambda i: (float(at_cue[i][-1].mean()), float(at_cue[i].mean()))))
    return [rates[index] for index in chosen]


def summarise(runs: Runs) -> dict[str, Any]:
    """What the seeds of a row did.

    Returns:
        steps: for each seed the step from which on the cue scored highest until the end, None if it did not;
        changes: how often the highest score moved to another sentence, mean over the seeds;
        ended: how many seeds ended at decoy, cue, and another sentence; accuracies; the share of seeds at the cue
        every ``_EVERY`` steps.
    """
    choices = runs.choices
    elsewhere = choices != CUE
    last = choices.shape[0] - elsewhere.flip(0).int().argmax(0)  # one past the last step elsewhere
    steps = torch.where(elsewhere.any(0), last, 0)
    escaped = ~elsewhere[-1]
    changes = (choices[1:] != choices[:-1]).sum(0)
    return {
        "steps": [int(step) if there else None for step, there in zip(steps, escaped, strict=True)],
        "changes": round(float(changes.double().mean()), 2),
        "ended": [int((choices[-1] == DECOY).sum()), int(escaped.sum()), int((choices[-1] > CUE).sum())],
        "accuracy": round(float(runs.accuracy.mean()), 4),
        "hard_accuracy": round(float(runs.hard_accuracy.mean()), 4),
        "trajectory": [round(float(share), 3) for share in (choices[::_EVERY] == CUE).double().mean(-1)],
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the study and returns what it wrote as JSON."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    path = args.output_dir / RESULTS_FILE
    if args.redraw:
        if not path.is_file():
            raise UsageError(f"--redraw needs the numbers of a run in {str(path)!r}, and there are none.")
    else:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, run(args, shlex.join(["python", "training/local_minimum.py", *argv])))
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    report(results, args.output_dir)
    print(f"\nNumbers, table and plots: {args.output_dir}")
    return results


def run(args: argparse.Namespace, command: str) -> str:
    """Runs every cell and returns the results as JSON, one row in a line."""
    rows, planned, started = [], cells(args.noise_scales), time.process_time()
    for done, (arm, scale, schedule) in enumerate(planned, start=1):
        rows += study(arm, scale, schedule, args)
        shares = ", ".join(f"{row['problem']} {row['ended'][1] / args.seeds:.2f}" for row in rows[-len(PROBLEMS) :])
        print(f"{done} of {len(planned)}: {arm.name}, noise {scale:g}, {schedule.name}: {shares}", flush=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "redraw")}
    results = {
        "command": command,
        "settings": {**settings, **vars(Sizes(steps=args.steps)), "every": _EVERY},
        "problems": [problem.name for problem in PROBLEMS],
        "schedules": {name: {"tau": s.tau, "noise_end": s.noise_end} for name, s in SCHEDULES.items()},
        "meanings": {name: arm.meaning for name, arm in {**CONTROLS, **ARMS}.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gumbel_attention": ga.__version__,
        },
        "threads": torch.get_num_threads(),
        "process_seconds": round(time.process_time() - started, 1),
    }
    lines = ",\n".join(json.dumps(row, allow_nan=False, separators=(",", ":")) for row in rows)
    head = json.dumps(results, indent=1, allow_nan=False).removesuffix("\n}")
    return f'{head},\n "rows": [\n{lines}\n ]\n}}\n'


def report(results: dict[str, Any], folder: Path) -> None:
    """Writes table and plots."""
    write_atomically(folder / TABLE_FILE, table(results))
    plot_shares(results).savefig(folder / "escape_share.png", dpi=90)
    plot_trajectories(results).savefig(folder / "trajectories.png", dpi=90)


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread
    main()
