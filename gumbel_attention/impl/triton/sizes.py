"""Sizes of tiles and of what kernels leave to each other; nothing here needs triton."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

PLACES = 128
"""Rows' statistics are stored by place, in multiples of this, which is one of all tiles of queries."""

POSITION_BLOCK = 16
"""Tiles start at multiples of this position: groups of the noise do not straddle two."""


LEAST_SHARED_MEMORY = 99 * 1024
"""Bytes of shared memory that a program must be able to have: no tile is made for less."""

AMPERE, HOPPER = 163 * 1024, 227 * 1024
"""Bytes of shared memory that a program may have on an A100 and on an H100."""


class Tile(NamedTuple):
    """Queries and keys of a tile, and how a program runs."""

    q: int
    k: int
    warps: int
    stages: int


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def tiles(length: int, shift: int, block: int) -> int:
    """Tiles of ``block`` positions that hold ``length`` positions of which the first is the place ``shift``."""
    return -(-(length + shift) // block)


def places(q_len: int, q_offset: int) -> int:
    """How many places the statistics of a head's rows take."""
    return tiles(q_len, q_offset % POSITION_BLOCK, PLACES) * PLACES


def forward_tile(d: int, dtype: torch.dtype, hard: bool, shared: int) -> Tile:
    """The tile of the forward kernel.

    Args:
        d: the larger head dim.
        dtype: of the inputs.
        hard: whether each query chooses one key.
        shared: bytes of shared memory that a program may have, as in the other two.
    """
    if interpreting():
        return Tile(32, 16, 4, 1)
    if dtype == torch.float32:
        if hard:
            return Tile(64, 32, 4, 2) if d <= 128 else Tile(32, 32, 8, 1)
        return Tile(32, 32, 4, 2) if d <= 64 else Tile(32, 16, 8, 1)
    if d <= 128:
        return Tile(128, 64, 8, 2 if d > 64 else 3)
    return Tile(128, 32, 8, 2 if shared >= AMPERE else 1)


def rows_tile(d: int, dtype: torch.dtype, hard: bool, shared: int) -> Tile:
    """The tile of the row kernel."""
    if interpreting():
        return Tile(32, 16, 4, 1)
    if dtype == torch.float32:
        if d <= 64:
            return Tile(32, 32, 4, 1)
        return Tile(32, 16, 8, 1) if hard or d > 128 else Tile(64, 16, 8, 1)
    if d <= 64:
        return Tile(128, 64, 8, 2)
    if d <= 128:
        return Tile(128, 32, 8, 2) if hard else Tile(128, 64, 8, 2)
    if shared < AMPERE:
        return Tile(32, 32, 4, 1)
    return Tile(64, 32, 8, 2) if hard else Tile(128, 32, 8, 1)


def columns_tile(d: int, dtype: torch.dtype, hard: bool, shared: int) -> Tile:
    """The tile of the column kernel; its queries divide those of the other two, whose rows it reads."""
    if interpreting():
        return Tile(16, 32, 4, 1)
    if dtype == torch.float32:
        if d <= 64:
            return Tile(32, 32, 4, 1)
        return Tile(16, 64 if d <= 128 else 32, 8, 1)
    if d <= 64:
        return Tile(64, 128, 8, 2)
    if d <= 128:
        return Tile(32, 128, 8, 2)
    if shared < AMPERE:
        return Tile(16, 64, 8, 1)
    return Tile(32, 128, 8, 1) if hard or shared >= HOPPER else Tile(32, 64, 8, 2)
