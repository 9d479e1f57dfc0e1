"""Gradient estimators written down a second time, from their formulas, with torch's own noise and no attention.

Each takes scores (count, n) and the slope f'(weights) -> (count, n) of a loss of one-hot or relaxed weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Slope = Callable[[Tensor], Tensor]


def gumbel(generator: torch.Generator, *shape: int) -> Tensor:
    return -torch.empty(shape, dtype=torch.float64).exponential_(generator=generator).log()


def jacobian_times(p: Tensor, vector: Tensor) -> Tensor:
    """(diag(p) - p p^T) vector."""
    return p * (vector - (p * vector).sum(-1, keepdim=True))


def one_hot(indices: Tensor, keys: int) -> Tensor:
    return torch.nn.functional.one_hot(indices, keys).double()


def relaxed(scores: Tensor, slope: Slope, tau: float, generator: torch.Generator) -> Tensor:
    p = ((scores + gumbel(generator, *scores.shape)) / tau).softmax(-1)
    return jacobian_times(p, slope(p)) / tau


def straight_through(scores: Tensor, slope: Slope, tau: float, generator: torch.Generator) -> Tensor:
    z = (scores + gumbel(generator, *scores.shape)) / tau
    return jacobian_times(z.softmax(-1), slope(one_hot(z.argmax(-1), scores.shape[-1]))) / tau


def gumbel_rao(
    scores: Tensor, slope: Slope, tau: float, generator: torch.Generator, samples: int, *, given_choice: bool = True
) -> Tensor:
    """Noise given the choice by exponential races; ``given_choice=False`` forgets to condition, which is wrong."""
    choice = torch.multinomial(scores[0].softmax(-1), len(scores), replacement=True, generator=generator)
    hard = one_hot(choice, scores.shape[-1])
    rates, total = scores.exp(), torch.zeros_like(scores)
    for _ in range(samples):
        races = torch.empty(scores.shape, dtype=torch.float64).exponential_(generator=generator)
        first = races.gather(-1, choice[:, None]) / rates.sum(-1, keepdim=True)
        times = torch.where(hard.bool(), first, first + races / rates) if given_choice else races / rates
        total += jacobian_times((-times.log() / tau).softmax(-1), slope(hard)) / tau
    return total / samples


def reinmax(scores: Tensor, slope: Slope, tau: float, choice: Tensor) -> Tensor:
    """Liu et al. 2023, algorithm 2, for the choices given."""
    hard, p = one_hot(choice, scores.shape[-1]), scores.softmax(-1)
    middle = (hard + (scores / tau).softmax(-1)) / 2
    g = slope(hard)
    return 2 * jacobian_times(middle, g) - jacobian_times(p, g) / 2
