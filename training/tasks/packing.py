"""Documents as one sequence of tokens, cut into blocks of equal length.

The documents follow each other, each after a separator. Block i holds the inputs i*L ... i*L + L - 1 of the sequence
and, as labels, the tokens that follow them: every token but the first separator is predicted exactly once. A block may
hold the end of one document and the beginning of the next, which then sees the former.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

PADDING_LABEL = -100


class PackedBlocks(Dataset[dict[str, list[int]]]):
    """The blocks of a sequence of tokens that lies, in pieces, in memory or in mapped files.

    Args:
        pieces: the tokens in order; they are referred to, not copied.
        block_size: inputs per block, L. The last block has what is left, at least one.

    Raises:
        ValueError: fewer than two tokens: there is nothing to predict.
    """

    def __init__(self, pieces: Iterable[NDArray[Any]], block_size: int) -> None:
        self._pieces = [piece for piece in pieces if len(piece)]
        self._starts = np.cumsum([0, *(len(piece) for piece in self._pieces)])
        self.tokens = int(self._starts[-1])
        self.block_size = block_size
        if self.tokens < 2:
            raise ValueError(f"expected at least two tokens, got {self.tokens}")

    def __len__(self) -> int:
        return -(-(self.tokens - 1) // self.block_size)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Up to L + 1 tokens under ``tokens``; the last one is the first of the next block."""
        if not 0 <= index < len(self):
            raise IndexError(f"expected a block in 0..{len(self) - 1}, got {index}")
        start = index * self.block_size
        return {"tokens": self._slice(start, min(start + self.block_size + 1, self.tokens)).tolist()}

    def _slice(self, start: int, stop: int) -> NDArray[Any]:
        parts = []
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first = int(self._starts[number])
            part = self._pieces[number][start - first : stop - first]
            parts.append(part)
            start, number = start + len(part), number + 1
        return np.concatenate(parts)


class StreamedBlocks(Dataset[dict[str, list[int]]]):
    """Blocks of a corpus that is read once, in order, while they are asked for; after its end it begins again.

    Blocks are asked for in ascending order, as a sequential sampler does; any may be left out, which costs the time
    to read them. One before the last that was asked for starts the reading anew. So a run that goes on gets the
    blocks of the run that was stopped.

    Args:
        documents: starts an iteration over the token lists of the documents, each with its separator first.
        block_size: inputs per block.
        length: number of blocks.
        buffer: blocks among which the next is drawn; 1 keeps their order.
        seed: of that draw.
    """

    def __init__(
        self, documents: Callable[[], Iterable[Sequence[int]]], block_size: int, length: int, buffer: int, seed: int
    ) -> None:
        self._documents = documents
        self._block_size = block_size
        self._length = length
        self._buffer = buffer
        self._seed = seed
        self._next = 0
        self._blocks: Iterator[list[int]] | None = None

    def __len__(self) -> int:
        return self._length

    def empty(self) -> bool:
        """Whether no document has any token, so that there is no block."""
        return not any(len(document) for document in self._documents())

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """L + 1 tokens under ``tokens``."""
        if not 0 <= index < self._length:
            raise IndexError(f"expected a block in 0..{self._length - 1}, got {index}")
        if self._blocks is None or index < self._next:
            self._blocks, self._next = self._shuffled(), 0
        block = next(itertools.islice(self._blocks, index - self._next, None))
        self._next = index + 1
        return {"tokens": block}

    def _shuffled(self) -> Iterator[list[int]]:
        generator = np.random.Generator(np.random.PCG64(self._seed))
        held: list[list[int]] = []
        for block in self._in_order():
            held.append(block)
            if len(held) >= self._buffer:
                place = int(generator.integers(len(held)))
                held[place], held[-1] = held[-1], held[place]
                yield held.pop()

    def _in_order(self) -> Iterator[list[int]]:
        """Blocks without end; the tokens that are left at the end of a pass stand before those of the next."""
        rest: list[int] = []
        while True:
            found = 0
            for document in self._documents():
                rest.extend(document)
                found += len(document)
                start = 0
                while len(rest) - start > self._block_size:
                    yield rest[start : start + self._block_size + 1]
                    start += self._block_size
                del rest[:start]
            if not found:
                raise ValueError("the stream holds no document with any text")


class DealtBlocks(Dataset[dict[str, list[int]]]):
    """One process's own blocks, under the numbers that Accelerate's sampler deals to it.

    The sampler deals the batches out in turn: of P processes, process p gets the batches p, p + P, p + 2P and so on.

    Args:
        blocks: of this process.
        batch_size: of this process.
        process: its number, from 0.
        processes: how many there are; each has as many blocks.
    """

    def __init__(self, blocks: Any, batch_size: int, process: int, processes: int) -> None:
        self._blocks = blocks
        self._batch_size = batch_size
        self._process = process
        self._processes = processes

    def __len__(self) -> int:
        """Blocks of all processes together."""
        return len(self._blocks) * self._processes

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """The block; IndexError for one that was dealt to another process."""
        batch, place = divmod(index, self._batch_size)
        own, process = divmod(batch, self._processes)
        if process != self._process:
            raise IndexError(f"block {index} is for process {process}, this is process {self._process}")
        block: dict[str, list[int]] = self._blocks[own * self._batch_size + place]
        return block


class BlockCollator:
    """Blocks as a batch: ``input_ids`` and ``labels``, both (B, L), where a label is the token after its input.

    Args:
        block_size: L; shorter blocks are padded on the right, so that all batches have one shape.
        padding_id: stands at the inputs of the padding, which no token before it sees; its labels are -100.
    """

    def __init__(self, block_size: int, padding_id: int) -> None:
        self._block_size = block_size
        self._padding_id = padding_id

    def __call__(self, blocks: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Makes a batch."""
        shape = (len(blocks), self._block_size)
        inputs, labels = np.full(shape, self._padding_id), np.full(shape, PADDING_LABEL)
        for row, block in enumerate(blocks):
            tokens = block["tokens"]  # a list: torch.tensor of each would take most of a small model's data loading
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, : len(tokens) - 1] = tokens[1:]
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
