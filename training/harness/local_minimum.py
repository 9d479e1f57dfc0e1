"""A task with an early choice that is good but not best, and runs of the smallest attention that can make it.

An example has n sentences, each a key and a word; attention picks sentences by their keys, and a linear reader turns
the attended word into a class. Sentence 0, the decoy, names the right class in 80 % of the examples; sentence 1, the
cue, always; the others say words at random. Attention starts with a preference for the decoy, so the reader learns
the decoy's language first.

- trap: the cue names classes in other words, its word for class c being the decoy's for c + 1. A reader that
  understands the decoy gets the cue wrong, and whoever looks at the cue a little more pays for it.
- plateau: both speak one language. Looking at the cue is never worse, only hard attention never sees it.

Each run has its own parameters, data and noise; many runs go side by side as columns of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import gumbel_attention as ga

DECOY, CUE = 0, 1
_EVALUATED = 200


@dataclass(frozen=True)
class Sizes:
    """Of the task and of a run."""

    sentences: int = 6
    classes: int = 4
    width: int = 8
    batch: int = 8
    steps: int = 400
    decoy_right: float = 0.8


@dataclass(frozen=True)
class Problem:
    """Where a run starts.

    Attributes:
        landscape: "trap" or "plateau".
        depth: how much higher the favoured sentence scores than the others.
        favoured: index of that sentence.
    """

    landscape: str
    depth: float
    favoured: int = DECOY

    @property
    def name(self) -> str:
        """Such as "trap 4", or "oracle" for a start at the cue."""
        return "oracle" if self.favoured == CUE else f"{self.landscape} {self.depth:g}"


@dataclass(frozen=True)
class Arm:
    """How attention chooses and learns.

    Attributes:
        name: of the arm.
        meaning: what it does, for the legend of a table.
        settings: arguments of ``ga.gumbel_softmax_with_info``.
    """

    name: str
    meaning: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Schedule:
    """Temperature and noise over training.

    Attributes:
        name: of the schedule.
        tau: at the start and at the end, exponential in between.
        noise_end: the noise scale at the end as a share of that at the start, linear in between.
    """

    name: str
    tau: tuple[float, float]
    noise_end: float = 1.0

    def tau_at(self, steps: int) -> Callable[[int], float]:
        """Step -> temperature."""
        start, end = self.tau
        if start == end:
            return ga.temperature_schedule("constant", start)
        return ga.temperature_schedule("exponential", start, end, steps)

    def noise_at(self, step: int, steps: int) -> float:
        """The share of the noise scale that is left."""
        return 1 + (self.noise_end - 1) * min(step / steps, 1)


class Runs(NamedTuple):
    """What the columns of a fit did.

    Attributes:
        choices: (steps + 1, columns) the sentence of the highest score, noise off, before each step and at the end.
        accuracy: (columns,) at the end, noise off, attention as in training (soft arms: soft).
        hard_accuracy: (columns,) the same with all weight on the highest score.
    """

    choices: Tensor
    accuracy: Tensor
    hard_accuracy: Tensor


class Columns(NamedTuple):
    """Runs side by side: the seed (as an index), problem and learning rate of each."""

    seeds: Sequence[int]
    problems: Sequence[Problem]
    rates: Sequence[float]


class Examples(NamedTuple):
    """words (examples, columns, sentences) and labels (examples, columns), both int64."""

    words: Tensor
    labels: Tensor


def draw_examples(count: int, seeds: int, sizes: Sizes, generator: torch.Generator) -> Examples:
    """Examples of the plateau for ``seeds`` columns: the cue says the label in the decoy's language."""
    c = sizes.classes
    labels = torch.randint(c, (count, seeds), generator=generator)
    words = torch.randint(c, (count, seeds, sizes.sentences), generator=generator)
    wrong = torch.rand(count, seeds, generator=generator) >= sizes.decoy_right
    shift = torch.randint(1, c, (count, seeds), generator=generator)
    words[..., DECOY] = torch.where(wrong, (labels + shift) % c, labels)
    words[..., CUE] = labels
    return Examples(words, labels)


def fit(arm: Arm, noise_scale: float, schedule: Schedule, columns: Columns, sizes: Sizes, seed: int) -> Runs:
    """Trains every column and says what it chose.

    Data and initial parameters depend on ``seed`` and the number of seeds alone: all arms share them, and so do the
    problems and rates of one seed. The noise is drawn anew for each column.

    Args:
        arm: how to attend.
        noise_scale: at the start; 0 switches the noise off.
        schedule: of temperature and noise.
        columns: the runs.
        sizes: of the task.
        seed: of data, initial parameters and noise.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    seeds, own = max(columns.seeds) + 1, torch.tensor(columns.seeds)
    trap = torch.tensor([problem.landscape == "trap" for problem in columns.problems])
    keys = torch.linalg.qr(torch.randn(seeds, sizes.width, sizes.width, generator=generator))[0][:, : sizes.sentences]
    readers = 0.1 * torch.randn(seeds, sizes.classes, sizes.classes, generator=generator)
    keys, reader = keys[own], readers[own].requires_grad_()
    starts = [problem.depth * keys[i, problem.favoured] for i, problem in enumerate(columns.problems)]
    query = torch.stack(starts).requires_grad_()
    optimizer = ColumnAdam([query, reader], torch.tensor(columns.rates))
    tau_at, settings = schedule.tau_at(sizes.steps), {"noise": "gumbel", **arm.settings}
    if noise_scale == 0:
        settings["noise"] = "none"

    def batch(count: int) -> Examples:
        words, labels = draw_examples(count, seeds, sizes, generator)
        words, labels = words[:, own], labels[:, own]
        words[..., CUE] = (words[..., CUE] + trap) % sizes.classes
        return Examples(words, labels)

    def read(weights: Tensor, examples: Examples) -> Tensor:
        attended = weights.new_zeros(*weights.shape[:-1], sizes.classes).scatter_add(-1, examples.words, weights)
        return torch.einsum("bcv,cvk->bck", attended, reader)

    choices = []
    for step in range(sizes.steps):
        scores = torch.einsum("cnd,cd->cn", keys, query)
        choices.append(scores.detach().argmax(-1).to(torch.int8))
        examples, scale = batch(sizes.batch), noise_scale * schedule.noise_at(step, sizes.steps)
        logits = scores.expand(sizes.batch, -1, -1)
        info = ga.gumbel_softmax_with_info(logits, tau_at(step), noise_scale=scale, **settings)
        losses = F.cross_entropy(read(info.weights, examples).movedim(-1, 1), examples.labels, reduction="none")
        if settings.get("estimator") == "score_function":
            assert info.log_prob is not None
            loss = ga.score_function_loss(losses, info.log_prob, baseline=ga.leave_one_out(losses))
        else:
            loss = losses.mean()
        optimizer.step(torch.autograd.grad(loss * len(own), [query, reader]))
    with torch.no_grad():
        scores = torch.einsum("cnd,cd->cn", keys, query)
        choices.append(scores.argmax(-1).to(torch.int8))
        examples = batch(_EVALUATED)
        hard = F.one_hot(scores.argmax(-1), sizes.sentences).float()
        used = hard if settings.get("hard") else (scores / tau_at(sizes.steps)).softmax(-1)
        right = [
            (read(weights.expand(_EVALUATED, -1, -1), examples).argmax(-1) == examples.labels).float().mean(0)
            for weights in (used, hard)
        ]
    return Runs(torch.stack(choices), *right)


class ColumnAdam:
    """Adam (beta 0.9 and 0.999) on tensors whose first dimension are the columns, each with a learning rate."""

    def __init__(self, parameters: Sequence[Tensor], rates: Tensor) -> None:
        self._parameters, self._rates, self._step = list(parameters), rates, 0
        self._means = [torch.zeros_like(p) for p in parameters]
        self._squares = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step down the gradients."""
        self._step += 1
        corrections = 1 - 0.9**self._step, math.sqrt(1 - 0.999**self._step)
        for p, g, mean, square in zip(self._parameters, gradients, self._means, self._squares, strict=True):
            mean.lerp_(g, 0.1)
            square.mul_(0.999).addcmul_(g, g, value=0.001)
            rates = self._rates.view(-1, *[1] * (p.ndim - 1))
            p -= rates / corrections[0] * mean / (square.sqrt() / corrections[1] + 1e-8)
