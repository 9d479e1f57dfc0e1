"""A VAE with 20 categorical latent variables on small digits: which gradient estimator gives the best bound?

The comparison of Jang, Gu & Poole (2017, arXiv:1611.01144, Table 1) on scikit-learn's 8 x 8 digits, by the bound
that hard samples of the posterior give on held-out images. All arms of a seed share the split of the images, the
initialisation and the order of the data; each has the learning rate that does best on the validation images.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import gumbel_attention as ga
from harness.errors import UsageError
from harness.flags import check_at_least, check_grid, end_if_refused
from harness.results import write_atomically
from harness.sampling import ARMS, Arm, Objective, choose_arms
from harness.vae import (
    THRESHOLD,
    CategoricalVAE,
    Split,
    divergence_from_uniform,
    load_images,
    negative_elbo,
    relaxed_objective,
    split_images,
)
from harness.vae_report import choose_rate, plot, report

KNOWN = ("gumbel-soft", "gumbel-st", "softmax-st", "reinforce-average", "reinforce-loo", "reinmax", "gumbel-rao")
RESULTS_FILE, TABLE_FILE, PLOT_FILE = "discrete_vae.json", "table.md", "validation.png"
OF_A_RUN = ("steps", "batch_size", "hidden", "tau_end", "eval_every", "test_samples")
"""Settings that a run depends on; the others say which runs there are."""

_VALIDATION_SEED, _TEST_SEED = 1, 2


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Estimators compared on a VAE with categorical latent variables.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("discrete_vae_output"), help="results folder")
    add("--arms", nargs="+", default=list(KNOWN), help="the arms to compare")
    add("--seeds", type=int, default=3, help="number of seeds, from 0 on; at least 2")
    add("--selection_seeds", type=int, default=1, help="the first so many seeds try every learning rate")
    add("--learning_rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="Adam's, the same grid for all")
    add("--steps", type=int, default=2500, help="optimiser steps of a run")
    add("--batch_size", type=int, default=64, help="images in a step")
    add("--hidden", type=int, default=128, help="width of the hidden layers")
    add(
        "--tau_end", type=float, default=0.5, help="tau is max(tau_end, exp(-r step)), at tau_end after half the steps"
    )
    add("--eval_every", type=int, default=125, help="steps between two looks at the validation images")
    add("--test_samples", type=int, default=30, help="posterior samples for each test image")
    args = parser.parse_args(argv)
    end_if_refused(parser, check_arguments, args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses settings that give no comparison.

    Raises:
        UsageError: says which setting, and what it may be.
    """
    choose_arms(args.arms, KNOWN)
    least = {
        "seeds": 2,
        "selection_seeds": 1,
        "steps": 2,
        "batch_size": 1,
        "hidden": 1,
        "eval_every": 1,
        "test_samples": 1,
    }
    check_at_least(args, least)
    if args.selection_seeds > args.seeds:
        raise UsageError(f"--selection_seeds must be at most --seeds {args.seeds}, got {args.selection_seeds}.")
    check_grid(args)
    if not 0 < args.tau_end < 1:
        raise UsageError(f"--tau_end must be between 0 and 1, where the schedule starts, got {args.tau_end}.")


def temperature(args: argparse.Namespace) -> Callable[[int], float]:
    """The annealing of Jang et al. (2017), max(tau_end, exp(-r step)), r such that half the steps are at tau_end."""
    rate = -math.log(args.tau_end) / (args.steps // 2)
    return ga.temperature_schedule("clipped_exponential", 1.0, args.tau_end, rate=rate)


def batches(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless index batches of equal size, a new random order in each pass."""
    order = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        rows = torch.randperm(count, generator=order)
        yield from rows[: count - count % size].split(size)


def training_loss(model: CategoricalVAE, objective: Objective, images: torch.Tensor, tau: float) -> torch.Tensor:
    """The negative ELBO of a batch, with the arm's gradient; the divergence is exact in every arm."""
    logits = model.encode(images)
    sample = objective.arm.draw(logits.expand(objective.arm.samples, *logits.shape), tau)
    return objective(model.reconstruction(sample.weights, images), sample) + divergence_from_uniform(logits).mean()


def train(
    arm: Arm, rate: float, seed: int, split: Split, args: argparse.Namespace, tau_at: Callable[[int], float]
) -> dict[str, Any]:
    """Trains one model and returns its row: the test bound of the weights that did best on the validation images."""
    torch.manual_seed(seed)
    model = CategoricalVAE(split.train.shape[1], args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    objective = Objective(arm)
    rows = batches(len(split.train), args.batch_size, seed)
    curve: list[float] = []
    best, best_step, best_state = float("inf"), 0, model.state_dict()
    for step in range(args.steps):
        loss = training_loss(model, objective, split.train[next(rows)], tau_at(step))
        if not loss.isfinite():
            raise UsageError(f"{arm.name} at learning rate {rate:g} lost its way at step {step}: take a lower one.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            bound = negative_elbo(model, split.validation, 4, _VALIDATION_SEED)
            curve.append(round((bound.reconstruction + bound.divergence).mean().item(), 4))
            if curve[-1] < best:
                best, best_step, best_state = curve[-1], step + 1, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    tested = negative_elbo(model, split.test, args.test_samples, _TEST_SEED)
    reconstruction, divergence = tested.reconstruction.mean().item(), tested.divergence.mean().item()
    row = {
        "arm": arm.name,
        "learning_rate": rate,
        "seed": seed,
        "validation": best,
        "best_step": best_step,
        "test": round(reconstruction + divergence, 4),
        "reconstruction": round(reconstruction, 4),
        "divergence": round(divergence, 4),
        "curve": curve,
    }
    if arm.name == "gumbel-soft":
        tau = tau_at(best_step - 1)
        row["relaxed"] = round(relaxed_objective(model, split.test, args.test_samples, _TEST_SEED, tau), 4)
    return row


def run(args: argparse.Namespace, study: Study) -> None:
    """Every arm at every learning rate for the selection seeds, then at its best one for the other seeds."""
    images = load_images()
    tau_at = temperature(args)
    arms = choose_arms(args.arms, KNOWN)
    for seed in range(args.seeds):
        split = split_images(images, seed)
        for arm in arms:
            tried = args.learning_rates if seed < args.selection_seeds else [study.best_rate(arm.name)]
            for rate in tried:
                if study.has(arm.name, rate, seed):
                    continue
                row = train(arm, rate, seed, split, args, tau_at)
                study.add(row)
                print(
                    f"  seed {seed}  {arm.name:<17}  learning rate {rate:g}  validation {row['validation']:.2f}  "
                    f"test {row['test']:.2f} nats  (step {row['best_step']})",
                    flush=True,
                )


class Study:
    """The rows of the runs so far, kept in a file: runs that it holds are not repeated.

    Raises:
        UsageError: the file is of runs with other settings.
    """

    def __init__(self, args: argparse.Namespace, argv: Sequence[str]) -> None:
        self.path = args.output_dir / RESULTS_FILE
        settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
        self.results: dict[str, Any] = {
            "command": shlex.join(["python", "training/discrete_vae.py", *argv]),
            "settings": settings,
            "data": {"name": "sklearn.datasets.load_digits", "threshold": THRESHOLD, "split": "60/20/20"},
            "meanings": {name: ARMS[name].meaning for name in args.arms},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "gumbel_attention": ga.__version__,
            },
            "threads": torch.get_num_threads(),
            "runs": self._earlier_runs(settings),
        }

    def _earlier_runs(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        earlier = json.loads(self.path.read_text(encoding="utf-8"))
        other = [name for name in OF_A_RUN if earlier["settings"][name] != settings[name]]
        if other:
            raise UsageError(
                f"{self.path} holds runs with --{other[0]} {earlier['settings'][other[0]]}, now it is "
                f"{settings[other[0]]}: take another --output_dir, or remove the file."
            )
        return earlier["runs"]

    def has(self, arm: str, rate: float, seed: int) -> bool:
        """Whether this run is done."""
        return any(
            (row["arm"], row["learning_rate"], row["seed"]) == (arm, rate, seed) for row in self.results["runs"]
        )

    def best_rate(self, arm: str) -> float:
        """The arm's learning rate, once the selection seeds are done."""
        return choose_rate(self.results, arm)

    def add(self, row: dict[str, Any]) -> None:
        """Takes a run in and writes the file."""
        self.results["runs"].append(row)
        self.save()

    def save(self) -> None:
        """Writes the file, each run on a line of its own."""
        text = json.dumps({**self.results, "runs": []}, indent=1, allow_nan=False)
        rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in self.results["runs"])
        write_atomically(self.path, text.replace('"runs": []', f'"runs": [\n  {rows}\n ]') + "\n")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the study and returns what it wrote as JSON."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    study = Study(args, argv)
    run(args, study)
    study.save()
    text = report(study.results)
    write_atomically(args.output_dir / TABLE_FILE, text)
    plot(study.results).savefig(args.output_dir / PLOT_FILE, dpi=110)
    print(f"\n{text}\nNumbers: {study.path}")
    return study.results


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread
    main()
