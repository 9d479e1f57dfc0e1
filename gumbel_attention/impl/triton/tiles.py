"""What forward and backward kernels do alike with a tile of scores: loads, noise, bias and masks.

A tile starts at a position that is a multiple of 16, for the noise's sake. So the places of queries count from
``-q_shift`` and those of keys from ``-k_shift``; indices below 0 do not exist.

Scores stay in the units of q k^T, as ``u = q k^T - noise_unit * n + bias / scale``, until the exponent takes
``u * exponent_scale``: that is log2(e) * Z, up to a constant of the row.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import LOWEST
from .noise import LN2, log2_exponential, philox_key, word_tile

LOG2E = tl.constexpr(1.4426950408889634)
NOISE_STREAM = tl.constexpr(0)
DROPOUT_STREAM = tl.constexpr(1)

ABSENT = tl.constexpr(0)
PER_KEY = tl.constexpr(1)
PER_SCORE = tl.constexpr(2)

VARYING = ("seed_heads", "h_offset", "q_len", "q_shift", "q_origin", "k_origin", "reach", "threshold")
"""Arguments whose divisibility changes no instruction: nothing is compiled again for it."""


class Kind(NamedTuple):
    """What a kernel is compiled for: head dims and their powers of two, tile sizes, and which parts take part."""

    D: Any
    BLOCK_D: Any
    DV: Any
    BLOCK_DV: Any
    Q: Any
    K: Any
    NOISE: Any
    CAUSAL: Any
    KEEP: Any
    BIAS: Any
    DROPOUT: Any


class Field(NamedTuple):
    """Lengths, what the places of tiles are ahead of indices and behind positions, and q_offset - k_offset."""

    q_len: Any
    k_len: Any
    q_shift: Any
    k_shift: Any
    q_origin: Any
    k_origin: Any
    reach: Any


class Matrix(NamedTuple):
    """The keys or values of a head: pointer and stride of a row."""

    pointer: Any
    row: Any


class Mask(NamedTuple):
    """A mask of a head: pointer, and strides of queries and keys."""

    pointer: Any
    q: Any
    k: Any


class Head(NamedTuple):
    """Numbers of a head: Philox's key, the factors of u's terms, and dropout's threshold and factor."""

    ka: Any
    kb: Any
    noise_unit: Any
    scale: Any
    exponent_scale: Any
    tau: Any
    threshold: Any
    survivor: Any


@triton.jit
def wide_indices(b, h, other_h):
    """Indices of an example and of heads in 64 bits, as their products with strides need them."""
    return b.to(tl.int64), h.to(tl.int64), other_h.to(tl.int64)


@triton.jit
def head_numbers(
    tau_ptr, tau_stride, noise_scale_ptr, noise_scale_stride, seed_ptr, seed_stride, seed_heads, h_offset, b, h, scale,
    threshold, survivor, kind: tl.constexpr,
):  # fmt: skip
    """The ``Head`` numbered ``h`` of example ``b``."""
    ka, kb, noise_unit = 0, 0, 0.0
    if kind.NOISE or kind.DROPOUT:
        seed = tl.load(seed_ptr + b * seed_stride)
        ka, kb = philox_key(seed, (b * seed_heads + h + h_offset).to(tl.uint32))
    if kind.NOISE:
        noise_unit = tl.load(noise_scale_ptr + h * noise_scale_stride) * LN2 / scale
    tau = tl.load(tau_ptr + h * tau_stride)
    return Head(ka, kb, noise_unit, scale, scale * LOG2E / tau, tau, threshold, survivor)


@triton.jit
def load_rows(matrix, start, end, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``start ... start + ROWS`` of a matrix; zeros outside ``0 ... end`` and in the columns after D."""
    return load_seen_rows(matrix, start, end, None, D, ROWS, BLOCK_D, False)


@triton.jit
def load_seen_rows(
    matrix, start, end, seen_ptr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SEEN: tl.constexpr
):
    """``load_rows`` with zeros for keys or values that no query sees: they may hold NaN, and 0 * NaN is NaN."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    present = (start + row >= 0) & (start + row < end)
    if SEEN:
        present = present & (tl.load(seen_ptr + start + row, mask=present, other=0) != 0)
    present = present[:, None]
    if D != BLOCK_D:
        present = present & (column < D)[None, :]
    place = matrix.pointer + start.to(tl.int64) * matrix.row + row[:, None] * matrix.row + column[None, :]
    return tl.load(place, mask=present, other=0.0)


@triton.jit
def store_rows(pointer, value, start, end, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores rows ``start ...`` that lie in ``0 ... end`` of a contiguous matrix, in its dtype."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    present = ((start + row >= 0) & (start + row < end))[:, None] & (column < D)[None, :]
    place = pointer + start.to(tl.int64) * D + row[:, None] * D + column[None, :]
    tl.store(place, value.to(pointer.dtype.element_ty), mask=present)


@triton.jit
def noise_tile(head, field, q_place, k_place, kind: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """n of ``log2_exponential`` in the tile of these places; 0 without noise."""
    n = 0.0
    if kind.NOISE:
        q, k = field.q_origin + q_place, field.k_origin + k_place
        n = log2_exponential(word_tile(head.ka, head.kb, q, k, NOISE_STREAM, kind.Q, kind.K, KEYS_FIRST))
    return n


@triton.jit
def survivors(head, field, q_place, k_place, kind: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Which weights in the tile of these places dropout keeps."""
    q, k = field.q_origin + q_place, field.k_origin + k_place
    word = word_tile(head.ka, head.kb, q, k, DROPOUT_STREAM, kind.Q, kind.K, KEYS_FIRST)
    return word >= head.threshold.to(tl.uint32)


@triton.jit
def perturbed(scores, n, head, bias, i, j, field, kind: tl.constexpr):
    """U of scores q k^T; queries ``i`` and keys ``j`` have shapes that broadcast to the tile."""
    u = scores
    if kind.NOISE:
        u = u - n * head.noise_unit
    if kind.BIAS != ABSENT:
        present = (j >= 0) & (j < field.k_len)
        place = bias.pointer + j.to(tl.int64) * bias.k
        if kind.BIAS == PER_SCORE:
            present = present & (i >= 0) & (i < field.q_len)
            place = place + i.to(tl.int64) * bias.q
        added = tl.load(place, mask=present, other=0.0).to(tl.float32) / head.scale
        u += tl.maximum(added, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return u


@triton.jit
def only_visible(x, keep, i, j, field, kind: tl.constexpr):
    """X where query ``i`` sees key ``j``, LOWEST elsewhere."""
    seen = (j >= 0) & (j < field.k_len)
    if kind.KEEP == PER_KEY:
        seen = seen & (tl.load(keep.pointer + j.to(tl.int64) * keep.k, mask=seen, other=0) != 0)
    if kind.CAUSAL:
        seen = seen & (j <= i + field.reach)
    if kind.KEEP == PER_SCORE:
        seen = seen & (i >= 0) & (i < field.q_len)
        place = keep.pointer + i.to(tl.int64) * keep.q + j.to(tl.int64) * keep.k
        seen = seen & (tl.load(place, mask=seen, other=0) != 0)
    return tl.where(seen, x, LOWEST)


@triton.jit
def key_places(i_first, field, kind: tl.constexpr):
    """Where the places of keys that a tile of queries needs stop needing no mask, where they end, and the last index.

    Queries ``i_first ...`` see no key from that index on.
    """
    k_end = field.k_len
    k_common = field.k_len
    if kind.CAUSAL:
        k_end = tl.maximum(tl.minimum(k_end, tl.minimum(i_first + kind.Q, field.q_len) + field.reach), 0)
        k_common = tl.maximum(tl.minimum(k_common, tl.maximum(i_first, 0) + field.reach + 1), 0)
    unmasked = 0
    if kind.KEEP == ABSENT:
        unmasked = tl.where(field.k_shift == 0, k_common // kind.K * kind.K, 0)
    return unmasked, k_end + field.k_shift, k_end
