"""Batches of examples of like length, in random order: less padding than batches of any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_POOL = 50
"""Batches that share a pool, out of which those of like length are taken; as in transformers' LengthGroupedSampler."""


class LengthGroupedSampler(Sampler[int]):
    """Draws all examples once, those of like length after each other, so that a batch holds texts of like length.

    The examples are shuffled and dealt into pools of 50 batches; a pool is sorted by length and cut into batches, and
    the batches of all pools are shuffled. A last batch that is not full stays the last. Unlike the sampler of the same
    name in transformers, whose pools go from long to short, no length has a place of its own in the epoch.

    Args:
        lengths: of the examples.
        batch_size: of the loader that this is for.
        generator: draws the order, and nothing else.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.lengths), generator=self.generator)
        full = len(order) - len(order) % self.batch_size
        batches = [
            batch
            for pool in order[:full].split(_POOL * self.batch_size)
            for batch in torch.tensor(sorted(pool.tolist(), key=self.lengths.__getitem__)).split(self.batch_size)
        ]
        for index in torch.randperm(len(batches), generator=self.generator).tolist():
            yield from batches[index].tolist()
        yield from order[full:].tolist()
