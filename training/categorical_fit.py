"""One categorical variable learnt by gradient through its samples: which estimator gets there, and in how many steps?

Logits theta of q = softmax(theta) over n classes start at zero. A step draws pairs (y, y') from q, one-hot or
relaxed as the arm has it, and lowers the mean of a loss. The target p differs by seed: a Dirichlet(1) draw.

- match:  (y - p) . (y' - p), whose expectation over independent hard y and y' is |q - p|^2, zero at q = p alone.
- reward: minus the mean of y . p and y' . p: the expected reward is that of a bandit that pays p_k for class k.
- curved: the mean of |y - p|^2 and |y' - p|^2. For a hard y this is 1 + |p|^2 - 2 p_k: the same bandit and the same
  optimum, the most probable class of p; but between the classes the loss has its minimum at y = p (in the manner of
  Tucker et al. 2017, arXiv:1703.07370), which leads relaxed samples astray.

The error is the total variation distance of q from p for match, and for the bandit the share of the possible gain
that is missed: (max p - q . p) / (max p - 1 / n).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gumbel_attention as ga
from harness.errors import UsageError
from harness.flags import check_at_least, check_grid, end_if_refused
from harness.results import write_atomically
from harness.sampling import ARMS, Arm, Objective, choose_arms

TASKS = ("match", "reward", "curved")
RESULTS_FILE, TABLE_FILE = "categorical_fit.json", "table.md"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Estimators compared on the parameters of one categorical variable.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("categorical_fit_output"), help="results folder")
    add("--tasks", nargs="+", default=list(TASKS), help="match, reward, curved")
    add("--arms", nargs="+", default=list(ARMS), help="the arms to compare")
    add("--seeds", type=int, default=5, help="number of reported seeds; as many others choose the learning rate")
    add(
        "--learning_rates",
        type=float,
        nargs="+",
        default=[0.003, 0.01, 0.03, 0.1, 0.3],
        help="Adam's, the same grid for all",
    )
    add("--steps", type=int, default=700, help="the budget of steps")
    add("--classes", type=int, default=10, help="classes of the variable")
    add("--pairs", type=int, default=8, help="pairs of samples in a step")
    add("--tau", type=float, default=0.5, help="temperature, constant, of the arms that have one")
    add("--accuracy", type=float, default=0.05, help="the error to get down to")
    add("--hold", type=int, default=20, help="consecutive steps at that accuracy that count as reached")
    args = parser.parse_args(argv)
    end_if_refused(parser, check_arguments, args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses settings that give no comparison.

    Raises:
        UsageError: says which setting, and what it may be.
    """
    choose_arms(args.arms, list(ARMS))
    unknown = [task for task in args.tasks if task not in TASKS]
    if unknown or len(set(args.tasks)) < len(args.tasks):
        raise UsageError(f"--tasks must name each of {', '.join(TASKS)} at most once, got {' '.join(args.tasks)}.")
    check_at_least(args, {"seeds": 1, "steps": 10, "classes": 2, "pairs": 2, "hold": 1})
    if args.hold > args.steps:
        raise UsageError(f"--hold must be at most --steps {args.steps}, got {args.hold}.")
    check_grid(args)
    for name, highest in {"tau": math.inf, "accuracy": 1.0}.items():
        if not 0 < getattr(args, name) < highest:
            raise UsageError(f"--{name} must be between 0 and {highest:g}, got {getattr(args, name)}.")


def make_targets(seeds: Sequence[int], classes: int) -> Tensor:
    """A draw of Dirichlet(1) for each seed: (seeds, classes)."""
    rows = []
    for seed in seeds:
        uniform = torch.rand(classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows.append(-torch.log1p(-uniform))
    draws = torch.stack(rows)
    return (draws / draws.sum(-1, keepdim=True)).float()


def loss_of(task: str, weights: Tensor, target: Tensor) -> Tensor:
    """The task's loss of pairs: weights (..., 2, classes) and targets (..., classes) -> (...)."""
    if task == "match":
        first, second = weights.unbind(-2)
        return ((first - target) * (second - target)).sum(-1)
    each = -(weights * target.unsqueeze(-2)) if task == "reward" else (weights - target.unsqueeze(-2)).square()
    return each.sum(-1).mean(-1)


def error_of(task: str, logits: Tensor, target: Tensor) -> Tensor:
    """How far softmax(logits) is from the task's optimum, between 0 and 1: (..., classes) -> (...)."""
    q = logits.softmax(-1)
    if task == "match":
        return (q - target).abs().sum(-1) / 2
    best = target.amax(-1)
    return (best - (q * target).sum(-1)) / (best - 1 / target.shape[-1])


def fit(arm: Arm, task: str, seeds: Sequence[int], args: argparse.Namespace) -> Tensor:
    """The error before each step, for every learning rate and seed: (steps, rates, seeds).

    All of these runs go side by side as columns of one tensor; they share no noise, and Adam treats each entry alone.
    """
    rates, classes = args.learning_rates, args.classes
    torch.manual_seed(seeds[0])
    target = make_targets(seeds, classes)
    columns = target.repeat(len(rates), 1)
    thetas = [torch.zeros(len(seeds), classes, requires_grad=True) for _ in rates]
    groups = [{"params": [theta], "lr": rate} for theta, rate in zip(thetas, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, fused=True)
    objective = Objective(arm, len(columns))
    errors = []
    for _ in range(args.steps):
        theta = torch.cat(thetas)
        errors.append(error_of(task, theta.detach(), columns))
        logits = theta.unsqueeze(1).expand(args.pairs, -1, 2, -1)
        sample = arm.draw(logits, args.tau)

        def soft_losses(logits: Tensor = logits) -> Tensor:
            return loss_of(task, ga.gumbel_softmax(logits[0], noise="none"), columns)

        loss = objective(loss_of(task, sample.weights, columns), sample, soft_losses) * len(columns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(errors).unflatten(1, (len(rates), len(seeds)))


def steps_to(errors: Sequence[float], accuracy: float, hold: int) -> int | None:
    """The first step from which ``hold`` errors in a row are at most ``accuracy``; None if there is none."""
    held = 0
    for step, error in enumerate(errors):
        held = held + 1 if error <= accuracy else 0
        if held == hold:
            return step - hold + 1
    return None


def summarise(errors: Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each seed of errors (steps, seeds): steps to the accuracy, and the mean error of the last tenth of steps."""
    final = errors[-max(len(errors) // 10, 1) :].mean(0).tolist()
    reached = [steps_to(column, args.accuracy, args.hold) for column in errors.T.tolist()]
    return [{"steps": steps, "error": round(error, 4)} for steps, error in zip(reached, final, strict=True)]


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def counted(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Steps of each seed, infinite where the accuracy was not reached."""
    return [math.inf if row["steps"] is None else row["steps"] for row in rows]


def study(arm: Arm, task: str, args: argparse.Namespace) -> dict[str, Any]:
    """Chooses the arm's learning rate on seeds of its own and returns the row of the reported seeds at that rate."""
    seeds = list(range(2 * args.seeds))
    errors = fit(arm, task, seeds, args)
    tuning = [summarise(errors[:, index, args.seeds :], args) for index in range(len(args.learning_rates))]
    best = min(range(len(tuning)), key=lambda index: _preference(tuning[index]))
    runs = summarise(errors[:, best, : args.seeds], args)
    return {"task": task, "arm": arm.name, "learning_rate": args.learning_rates[best], "seeds": runs}


def _preference(rows: Sequence[Mapping[str, Any]]) -> tuple[int, float, float]:
    """Lower is better: seeds that missed the accuracy, median steps, mean final error."""
    steps = counted(rows)
    return sum(map(math.isinf, steps)), median(steps), sum(row["error"] for row in rows) / len(rows)


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown, one table for each task."""
    settings = results["settings"]
    titles = {"match": "match a distribution", "reward": "expected reward", "curved": "the same reward, curved loss"}
    heads = "| arm | learning rate | steps, median (range) | seeds that got there | final error, median (range) |"
    parts = []
    for task in settings["tasks"]:
        rows = sorted((row for row in results["rows"] if row["task"] == task), key=_rank)
        lines = [f"**{task}**: {titles[task]}", "", heads, "| --- | ---: | ---: | ---: | ---: |"]
        parts.append("\n".join(lines + [_table_row(row, settings["learning_rates"]) for row in rows]))
    rates = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
    note = (
        f"Reached: an error of at most {settings['accuracy']:g} over {settings['hold']} steps in a row; "
        f"{settings['seeds']} seeds, at most {settings['steps']} steps of {settings['pairs']} pairs of samples, "
        f"{settings['classes']} classes, tau {settings['tau']:g}. Final error: mean of the last tenth of the steps. "
        f"Adam at {rates}: the rate is chosen for each arm and task on other seeds; "
        '"edge": it is at an end of the grid.'
    )
    legend = [f"- `{name}`: {meaning}." for name, meaning in results["meanings"].items()]
    return "\n".join(["\n\n".join(parts), "", note, "", *legend, ""])


def _rank(row: Mapping[str, Any]) -> tuple[float, float]:
    return median(counted(row["seeds"])), median([seed["error"] for seed in row["seeds"]])


def _table_row(row: Mapping[str, Any], grid: Sequence[float]) -> str:
    steps, errors = counted(row["seeds"]), [seed["error"] for seed in row["seeds"]]
    edge = " (edge)" if len(grid) > 1 and row["learning_rate"] in (min(grid), max(grid)) else ""
    reached = sum(step < math.inf for step in steps)
    if reached == 0:
        shown = "not reached"
    else:
        middle, low, high = (_steps_text(value) for value in (median(steps), min(steps), max(steps)))
        shown = f"{middle} ({low}-{high})"
    accuracy = f"{median(errors):.3f} ({min(errors):.3f}-{max(errors):.3f})"
    return f"| `{row['arm']}` | {row['learning_rate']:g}{edge} | {shown} | {reached} of {len(steps)} | {accuracy} |"


def _steps_text(value: float) -> str:
    return "not reached" if math.isinf(value) else f"{value:g}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the study and returns what it wrote as JSON."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for task in args.tasks:
        for arm in choose_arms(args.arms, list(ARMS)):
            rows.append(study(arm, task, args))
            print(_table_row(rows[-1], args.learning_rates).strip("| "), f" [{task}]", flush=True)
    results = {
        "command": shlex.join(["python", "training/categorical_fit.py", *argv]),
        "settings": {name: value for name, value in vars(args).items() if name != "output_dir"},
        "meanings": {name: ARMS[name].meaning for name in args.arms},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gumbel_attention": ga.__version__,
        },
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    write_atomically(args.output_dir / RESULTS_FILE, json.dumps(results, indent=1, allow_nan=False) + "\n")
    text = table(results)
    write_atomically(args.output_dir / TABLE_FILE, text)
    print(f"\n{text}\nNumbers: {args.output_dir / RESULTS_FILE}")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread
    main()
