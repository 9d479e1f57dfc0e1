"""A patched two-layer transformer on generated stories, trained through each gradient estimator of a hard choice.

A BERT of two layers reads story and question as one sequence of tokens and names the place. Its last layer attends
with each arm's setting. All arms of a seed share stories, initialisation, order of the data and optimiser steps; each
has the learning rate of the same grid that does best on the validation stories of the first seed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import gumbel_attention as ga
from harness.errors import UsageError
from harness.flags import check_at_least, check_grid, end_if_refused
from harness.results import write_atomically
from tasks.babi import Vocabulary, WorldSettings, generate_stories
from tasks.story_report import choose_rate, report
from tasks.story_sequence import SequenceBatch, encode_sequences, story_encoder

RESULTS_FILE, TABLE_FILE = "story_estimators.json", "table.md"
LAYERS = (-1,)
"""The last layer. The loss depends on one query of it, the first token's, so that one choice of each head is all that
an estimator has to see through; the first layer, which puts a sentence's words together, stays softmax in all arms."""
NOISY_PASSES = 4
NOT_COMPARED = ("output_dir", "arms", "seeds", "learning_rates")
"""Settings that say which runs there are, not what a run does."""


class Arm(NamedTuple):
    """One way to train.

    Attributes:
        meaning: what it does, for the legend of the table.
        settings: of the attention.
        fixed_tau: the arm's temperature; None takes the schedule's.
        baseline: "average", "leave_one_out" or "soft" for the score function; None: the weights carry the gradient.
        samples: choices drawn for each story in a step.
    """

    meaning: str
    settings: Mapping[str, Any]
    fixed_tau: float | None = None
    baseline: str | None = None
    samples: int = 1

    def config(self, tau: float) -> ga.GumbelAttentionConfig:
        """The patched layer's settings where the schedule starts with ``tau``."""
        return ga.GumbelAttentionConfig(tau=self.tau(tau), layers=LAYERS, **self.settings)

    def tau(self, scheduled: float) -> float:
        """The temperature of this arm where the schedule has ``scheduled``."""
        return scheduled if self.fixed_tau is None else self.fixed_tau

    @property
    def extra_passes(self) -> int:
        """Forward passes of a step beyond the first."""
        return self.samples - 1 + (self.baseline == "soft")


_SCORE = {"hard": True, "estimator": "score_function"}
ARMS = {
    "softmax": Arm("softmax, tau 1", {"noise": "none"}, fixed_tau=1.0),
    "softmax-tau": Arm("softmax with the schedule's temperature, no noise", {"noise": "none"}),
    "gumbel-soft": Arm("the relaxed choice under Gumbel noise", {}),
    "gumbel-st": Arm("hard choice under Gumbel noise, straight-through", {"hard": True}),
    "det-st": Arm("hard choice without noise, straight-through", {"hard": True, "noise": "none"}),
    "normal-st": Arm(
        "hard choice under Normal noise of the same variance, straight-through", {"hard": True, "noise": "normal"}
    ),
    "gumbel-rao": Arm(
        "hard choice under Gumbel noise, Gumbel-Rao with K = 10",
        {"hard": True, "estimator": "gumbel_rao", "samples": 10},
    ),
    "reinmax": Arm(
        "hard choice under Gumbel noise, ReinMax at its own constant tau 1 (it is defined for tau >= 1)",
        {"hard": True, "estimator": "reinmax"},
        fixed_tau=1.0,
    ),
    "reinforce-average": Arm("score function, baseline: moving average of the losses", _SCORE, 1.0, "average"),
    "reinforce-loo": Arm(
        "score function, 4 choices of each story, baseline: mean loss of the other 3", _SCORE, 1.0, "leave_one_out", 4
    ),
    "reinforce-soft": Arm("score function, baseline: loss of the soft output, softmax(scores)", _SCORE, 1.0, "soft"),
    "top2-st": Arm("two keys under Gumbel noise, straight-through", {"hard": True, "top_k": 2}),
}


class Splits(NamedTuple):
    """Training, validation and test stories of one seed."""

    train: SequenceBatch
    validation: SequenceBatch
    test: SequenceBatch
    vocabulary: Vocabulary
    facts: int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Gradient estimators compared on a patched two-layer transformer and generated stories.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("story_estimators_output"), help="results folder; its runs are kept")
    add("--arms", nargs="+", default=list(ARMS), help="the arms to compare")
    add("--seeds", type=int, default=3, help="number of seeds, from 0 on")
    add("--steps", type=int, default=500, help="optimiser steps of a run")
    add("--batch_size", type=int, default=32, help="stories in a step")
    add(
        "--learning_rates",
        type=float,
        nargs="+",
        default=[1.5e-3, 3e-3],
        help="peaks of the one-cycle schedule to try",
    )
    add("--tau_start", type=float, default=1.0, help="first temperature of the exponential schedule")
    add("--tau_end", type=float, default=0.5, help="its last temperature")
    add("--target", type=float, default=0.9, help="validation accuracy to be reached")
    add("--eval_every", type=int, default=25, help="steps between two looks at the validation stories")
    add("--train_stories", type=int, default=3000, help="number of training stories")
    add("--test_stories", type=int, default=1000, help="number of test stories")
    add("--validation_stories", type=int, default=300, help="number of validation stories")
    add("--facts", type=int, default=2, help="sentences about the world in a story")
    add("--distractors", type=int, default=0, help="sentences in a story that change nothing")
    add("--actors", type=int, default=4, help="number of actors")
    add("--places", type=int, default=4, help="number of places")
    args = parser.parse_args(argv)
    end_if_refused(parser, check_arguments, args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses settings that give no comparison.

    Raises:
        ValueError: says which setting, and what it may be.
    """
    unknown = [name for name in args.arms if name not in ARMS]
    if unknown or len(set(args.arms)) < len(args.arms):
        raise UsageError(f"--arms must be different ones of {list(ARMS)}, got {args.arms}.")
    positive = ("seeds", "steps", "batch_size", "eval_every", "train_stories", "validation_stories", "test_stories")
    check_at_least(args, dict.fromkeys(positive, 1))
    check_grid(args)
    if not 0 < args.target <= 1:
        raise UsageError(f"--target must be above 0 and at most 1, got {args.target}.")
    ga.temperature_schedule("exponential", args.tau_start, args.tau_end, args.steps)
    world(args, 1)


def world(args: argparse.Namespace, stories: int) -> WorldSettings:
    """What stories are made of."""
    names = ("facts", "distractors", "actors", "places")
    return WorldSettings(stories=stories, **{name: getattr(args, name) for name in names})


def make_splits(args: argparse.Namespace, seed: int) -> Splits:
    """Generates the stories of a seed; none for validation or test is among those for training.

    Raises:
        UsageError: the world has too few different stories for that.
    """
    train = generate_stories(world(args, args.train_stories), 3 * seed)
    seen = {(story.facts, story.question) for story in train}
    splits = [train]
    for number, size in ((1, args.validation_stories), (2, args.test_stories)):
        fresh = generate_stories(world(args, 8 * size), 3 * seed + number)
        fresh = [story for story in fresh if (story.facts, story.question) not in seen][:size]
        if len(fresh) < size:
            raise UsageError(
                f"found {len(fresh)} of {size} stories that are not among the {len(train)} for training: take fewer "
                "--train_stories, or a larger world."
            )
        splits.append(fresh)
    vocabulary = Vocabulary(train)
    return Splits(
        *(encode_sequences(stories, vocabulary) for stories in splits), vocabulary, args.facts + args.distractors
    )


def make_model(splits: Splits, seed: int) -> nn.Module:
    """The model before its patch, the same for all arms."""
    torch.manual_seed(seed)
    return story_encoder(splits.vocabulary, splits.facts, splits.train.input_ids.shape[1])


def story_losses(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """The loss of each story, (B,)."""
    return F.cross_entropy(model(**batch.inputs()).logits, batch.answer, reduction="none")


class Objective:
    """The loss whose gradient is an arm's: the mean loss, or the score function's with the arm's baseline."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.average = ga.MovingAverageBaseline()

    def __call__(self, model: nn.Module, batch: SequenceBatch) -> Tensor:
        """Returns the loss of a batch, ()."""
        arm = self.arm
        if arm.baseline is None:
            return story_losses(model, batch).mean()
        drawn = batch.repeat(arm.samples)
        first = torch.zeros_like(drawn.input_ids, dtype=torch.bool)
        first[:, 0] = True
        with ga.collect_log_probs(model) as chosen:
            losses = story_losses(model, drawn)
        shape = (arm.samples, len(batch)) if arm.samples > 1 else (len(batch),)
        losses, log_prob = losses.view(shape), chosen.log_prob(first).view(shape)
        return ga.score_function_loss(losses, log_prob, self._baseline(model, batch, losses))

    def _baseline(self, model: nn.Module, batch: SequenceBatch, losses: Tensor) -> Tensor:
        if self.arm.baseline == "leave_one_out":
            return ga.leave_one_out(losses)
        if self.arm.baseline == "soft":
            with torch.no_grad(), ga.soft_attention(model):
                return story_losses(model, batch)
        before = self.average.value.clone()
        self.average.update(losses)
        return before


@torch.no_grad()
def accuracy(model: nn.Module, data: SequenceBatch) -> float:
    """Share of right answers in eval mode."""
    model.eval()
    right = (model(**data.inputs()).logits.argmax(-1) == data.answer).double().mean().item()
    model.train()
    return right


def test_accuracies(model: nn.Module, patch: ga.ModelPatch, arm: Arm, test: SequenceBatch) -> dict[str, float]:
    """Test accuracy without noise, with it, and with the one key of largest weight in each row."""
    found = {"test": accuracy(model, test)}
    with patch.noise("gumbel" if arm.settings.get("noise") == "none" else True):
        found["test_noise"] = math.fsum(accuracy(model, test) for _ in range(NOISY_PASSES)) / NOISY_PASSES
    patch.remove()
    with ga.patch_model(model, ga.GumbelAttentionConfig(hard=True, noise="none", layers=LAYERS)):
        found["test_one_key"] = accuracy(model, test)
    return {name: round(value, 4) for name, value in found.items()}


def train(name: str, rate: float, seed: int, splits: Splits, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one model and returns its row; a loss that is not finite ends the training before the step."""
    arm, model = ARMS[name], make_model(splits, seed)
    patch = ga.patch_model(model, arm.config(args.tau_start))
    tau_at: Callable[[int], float] = ga.temperature_schedule("exponential", args.tau_start, args.tau_end, args.steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=args.steps + 1, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    objective, curve, seconds, lost_at = Objective(arm), [], 0.0, None
    model.train()
    for step in range(args.steps):
        start = time.process_time()
        patch.set_tau(arm.tau(tau_at(step)))
        rows = torch.randint(len(splits.train), (args.batch_size,), generator=order)
        loss = objective(model, splits.train.select(rows))
        if not loss.isfinite():
            lost_at = step
            break
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - start
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            curve.append([step + 1, round(accuracy(model, splits.validation), 4)])
    reached = [step for step, value in curve if value >= args.target]
    return {
        "arm": name,
        "learning_rate": rate,
        "seed": seed,
        "validation": curve[-1][1] if curve else 0.0,
        "steps_to_target": reached[0] if reached else None,
        **test_accuracies(model, patch, arm, splits.test),
        "seconds_per_step": round(seconds / max(args.steps if lost_at is None else lost_at, 1), 5),
        "extra_passes": arm.extra_passes,
        "lost_at": lost_at,
        "curve": curve,
    }


class Runs:
    """The rows of a results file, written after every run, so that an interrupted study goes on where it was."""

    def __init__(self, args: argparse.Namespace, argv: Sequence[str]) -> None:
        self.path = args.output_dir / RESULTS_FILE
        self.head = {
            "command": shlex.join(["python", "training/story_estimators.py", *argv]),
            "settings": {name: value for name, value in vars(args).items() if name != "output_dir"},
            "layers": list(LAYERS),
            "noisy_passes": NOISY_PASSES,
            "meanings": {name: ARMS[name].meaning for name in args.arms},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "gumbel_attention": ga.__version__,
            },
            "threads": torch.get_num_threads(),
        }
        self.rows = self._kept() if self.path.exists() else []

    def _kept(self) -> list[dict[str, Any]]:
        before = json.loads(self.path.read_text(encoding="utf-8"))
        for part in ("settings", "versions"):
            for name in {**self.head[part], **before[part]}:
                old, new = before[part].get(name), self.head[part].get(name)
                if old != new and name not in NOT_COMPARED:
                    raise UsageError(
                        f"{self.path} holds runs with {name} {old!r}, this one would have {new!r}: take another "
                        "--output_dir, or the settings of before."
                    )
        return list(before["runs"])

    def find(self, arm: str, rate: float, seed: int) -> dict[str, Any] | None:
        """The row of a run that is finished."""
        key = {"arm": arm, "learning_rate": rate, "seed": seed}
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a finished run."""
        self.rows.append(row)
        self.write()

    def write(self) -> str:
        """Writes numbers and table, of as many runs as there are, and returns the table."""
        results, table = self.results(), report(self.results())
        write_atomically(self.path, json.dumps(results, indent=1, allow_nan=False) + "\n")
        write_atomically(self.path.with_name(TABLE_FILE), table)
        return table

    def results(self) -> dict[str, Any]:
        """All that the table is made of: the runs of the arms, learning rates and seeds asked for, and of others."""
        return {**self.head, "runs": self.rows}


def run(args: argparse.Namespace, runs: Runs) -> None:
    """Every arm at every learning rate for seed 0, then the other seeds, each arm at its best rate."""

    def record(arm: str, rate: float, seed: int, splits: Splits) -> None:
        if runs.find(arm, rate, seed) is not None:
            return
        row = train(arm, rate, seed, splits, args)
        runs.add(row)
        print(
            f"  {arm:<17}  learning rate {rate:g}  seed {seed}  validation {row['validation']:.1%}  test "
            f"{row['test']:.1%}  ({row['seconds_per_step'] * 1e3:.0f} ms per step)",
            flush=True,
        )

    for seed in range(args.seeds):
        splits = make_splits(args, seed)
        for arm in args.arms:
            for rate in args.learning_rates if seed == 0 else [choose_rate(runs.results(), arm)]:
                record(arm, rate, seed, splits)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the study and returns what it wrote as JSON."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    runs = Runs(args, argv)
    run(args, runs)
    print(f"\n{runs.write()}\nNumbers: {args.output_dir / RESULTS_FILE}")
    return runs.results()


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread
    try:
        main()
    except UsageError as error:
        sys.exit(f"error: {error}")
