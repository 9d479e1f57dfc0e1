"""Noise that belongs to a training example: the same whenever the example comes by."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import gumbel_attention as ga

INDEX = "index"
"""Entry of a batch with the numbers of its examples, int64 (B,)."""


def split_index(batch: Any) -> tuple[Any, Tensor | None]:
    """The inputs of the model, and the examples' numbers if the batch has them; the batch stays as it is."""
    if INDEX not in batch:
        return batch, None
    return {name: value for name, value in batch.items() if name != INDEX}, batch[INDEX]


def noise_of_examples(model: torch.nn.Module, index: Tensor | None, seed: int) -> AbstractContextManager[Any]:
    """Within this context each example has the noise of its number, and the run's seed; without numbers, fresh noise.

    Args:
        model: patched, as it is or wrapped.
        index: (B,), of the next forward passes' examples.
        seed: the run's.
    """
    if index is None:
        return nullcontext()
    restore: AbstractContextManager[Any] = ga.patch_of(model).seeds((seed << 32) + index)
    return restore
