"""The noise on the device: the words of ``gumbel_attention.noise`` bit for bit, and Gumbel's logarithm of them.

One Philox call serves the 2 x 2 group {q, q ^ 8} x {k, k ^ 8}. Tiles start at multiples of 16 positions, so that a
group never straddles two; in the layouts of matrix products its four scores lie in one thread.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import log2, negative_log2, wide_product

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _fmix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def philox_key(seed, bh):
    """The two key words of an int64 seed and a uint32 head."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    ka = _fmix(low ^ _fmix(bh * 0x9E3779B1 + 0x7F4A7C15))
    kb = _fmix(high + _fmix(ka + bh))
    return ka, kb


@triton.jit
def _round(c0, c1, c2, c3, ka, kb):
    high0, low0 = wide_product(c0, 0xD2511F53)
    high1, low1 = wide_product(c2, 0xCD9E8D57)
    return high1 ^ c1 ^ ka, low1, high0 ^ c3 ^ kb, low0


@triton.jit
def philox(c0, c1, c2, c3, ka, kb):
    """Seven rounds of Philox 4x32; what depends on a row or a column of a tile alone stays one."""
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, ka, kb)
    for _ in tl.static_range(6):
        ka += 0x9E3779B9
        kb += 0xBB67AE85
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, ka, kb)
    return c0, c1, c2, c3


@triton.jit
def word_at(ka, kb, q, k, STREAM: tl.constexpr):
    """The words of single pairs of positions."""
    stream, zero = tl.full((1,), STREAM, tl.uint32), tl.full((1,), 0, tl.uint32)
    c0, c1, c2, c3 = philox((q & ~8).to(tl.uint32), stream, (k & ~8).to(tl.uint32), zero, ka, kb)
    first_k = (k & 8) == 0
    return tl.where((q & 8) == 0, tl.where(first_k, c0, c1), tl.where(first_k, c2, c3))


@triton.jit
def _leaders(origin, axis: tl.constexpr, SIZE: tl.constexpr):
    """Of the positions ``origin ... origin + SIZE`` those with bit 3 unset, along ``axis`` of two."""
    i = tl.arange(0, SIZE // 2)
    leaders = (origin + ((i >> 3) * 16 + (i & 7))).to(tl.uint32)
    return tl.expand_dims(leaders, 1 - axis)


@triton.jit
def _interleave(c00, c01, c10, c11, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of which these are quarters: c01 has the rows with bit 3 unset and the columns with bit 3 set."""
    quarters = tl.join(tl.join(c00, c01), tl.join(c10, c11))  # (..., bit of the column, bit of the row)
    quarters = tl.reshape(quarters, (ROWS // 16, 8, COLUMNS // 16, 8, 2, 2))
    return tl.reshape(tl.permute(quarters, (0, 5, 1, 2, 4, 3)), (ROWS, COLUMNS))


@triton.jit
def word_tile(
    ka, kb, q_origin, k_origin, STREAM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """The words at positions ``q_origin ...`` by ``k_origin ...``, both multiples of 16: (BLOCK_Q, BLOCK_K).

    With ``KEYS_FIRST`` the same tile transposed.
    """
    q = _leaders(q_origin, 1 if KEYS_FIRST else 0, BLOCK_Q)
    k = _leaders(k_origin, 0 if KEYS_FIRST else 1, BLOCK_K)
    stream, zero = tl.full((1, 1), STREAM, tl.uint32), tl.full((1, 1), 0, tl.uint32)
    c0, c1, c2, c3 = philox(q, stream, k, zero, ka, kb)
    if KEYS_FIRST:
        tile = _interleave(c0, c2, c1, c3, BLOCK_K, BLOCK_Q)
    else:
        tile = _interleave(c0, c1, c2, c3, BLOCK_Q, BLOCK_K)
    return tile


@triton.jit
def log2_exponential(word):
    """n = log2(E) + log2(log2(e)), where E is Exponential(1) and -log(E) the Gumbel of the word.

    E / ln 2 is -log2(1 - v). The fast log2 errs by up to 2^-22 near 1, so 1 - v is raised to put -log2 below the
    truth, and for small v the first two terms of the series, which are below it too, take over by being larger.
    """
    x = word.to(tl.float32)
    small = x * (x * 3.9104211e-20 + 3.3590360e-10) + 1.679518e-10
    return log2(tl.maximum(negative_log2(x * -2.3283069798e-10 + 1.00000048), small))
