"""The forward kernel: attention with relaxed weights, or the value of the best key."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LOWEST, dot, exp2, log2, product
from .noise import word_at
from .tiles import (
    ABSENT,
    DROPOUT_STREAM,
    VARYING,
    Field,
    Kind,
    Mask,
    Matrix,
    head_numbers,
    key_places,
    load_rows,
    load_seen_rows,
    noise_tile,
    only_visible,
    perturbed,
    store_rows,
    survivors,
    wide_indices,
)

NO_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def _scores(q, keys, keep, bias, head, field, i, q_place, k_place, kind: tl.constexpr, MASKED: tl.constexpr):
    """U of a tile of queries and the keys from ``k_place``, LOWEST where a key is not seen."""
    start = k_place - field.k_shift
    j = (start + tl.arange(0, kind.K))[None, :]
    k = load_rows(keys, start, field.k_len, kind.D, kind.K, kind.BLOCK_D)
    n = noise_tile(head, field, q_place, k_place, kind, False)
    u = perturbed(product(q, tl.trans(k), kind.Q, kind.K), n, head, bias, i, j, field, kind)
    if MASKED:
        u = only_visible(u, keep, i, j, field, kind)
    return u


@triton.jit
def _relaxed_tiles(
    output, total, best, q, keys, values, keep, bias, seen_ptr, head, field, i, q_place, first, last, k_end,
    kind: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys at places ``first ... last``; ``output`` and ``total`` are relative to ``best``, the largest u."""
    for k_place in tl.range(first, last, kind.K):
        u = _scores(q, keys, keep, bias, head, field, i, q_place, k_place, kind, MASKED)
        higher = tl.maximum(best, tl.max(u, 1))
        reference = higher
        if MASKED:  # while no key was seen, weights are exp2(LOWEST - 0) = 0
            reference = tl.where(higher == LOWEST, 0.0, higher)
        weights = exp2(u * head.exponent_scale - (reference * head.exponent_scale)[:, None])
        rescale = exp2((best - reference) * head.exponent_scale)
        best = higher
        total = total * rescale + tl.sum(weights, 1)
        if kind.DROPOUT:
            kept = survivors(head, field, q_place, k_place, kind, False)
            weights = tl.where(kept, weights * head.survivor, 0.0)
        v = load_seen_rows(
            values, k_place - field.k_shift, k_end, seen_ptr, kind.DV, kind.K, kind.BLOCK_DV, kind.KEEP != ABSENT
        )
        output = dot(weights.to(v.dtype), v, output * rescale[:, None])
    return output, total, best


@triton.jit
def _best_tiles(
    best, best_place, q, keys, keep, bias, head, field, i, q_place, first, last, kind: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The largest u at each place of a tile, and the first tile that had it.

    Nothing is reduced over keys until the end: a reduction of values with their indices at each tile costs more.
    """
    for k_place in tl.range(first, last, kind.K):
        u = _scores(q, keys, keep, bias, head, field, i, q_place, k_place, kind, MASKED)
        best_place = tl.where(u > best, k_place, best_place)
        best = tl.maximum(u, best)
    return best, best_place


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, output_ptr, lse_ptr, index_ptr, keep_ptr, bias_ptr, seen_ptr, tau_ptr, noise_scale_ptr,
    seed_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, keep_batch, keep_head, keep_q,
    keep_k, bias_batch, bias_head, bias_q, bias_k, seen_batch, seen_head, tau_stride, noise_scale_stride, seed_stride,
    seed_heads, h_offset, heads, group, q_len, k_len, places, q_shift, k_shift, q_origin, k_origin, reach, scale,
    threshold, survivor, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HARD: tl.constexpr, NOISE: tl.constexpr, CAUSAL: tl.constexpr,
    KEEP: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head: the output, and for the backward pass log2 of the sum of exponents, or the index.

    The index of a row is that of the chosen key, or -1 where there is none or dropout took it.
    """
    kind: tl.constexpr = Kind(D, BLOCK_D, DV, BLOCK_DV, BLOCK_Q, BLOCK_K, NOISE, CAUSAL, KEEP, BIAS, DROPOUT)
    field = Field(q_len, k_len, q_shift, k_shift, q_origin, k_origin, reach)
    tiles = tl.cdiv(q_len + q_shift, BLOCK_Q)
    q_place = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q  # under a causal mask the long rows come first
    bh = tl.program_id(0) // tiles
    b, h, kv_head = wide_indices(bh // heads, bh % heads, bh % heads // group)
    keys = Matrix(k_ptr + b * k_batch + kv_head * k_head, k_row)
    values = Matrix(v_ptr + b * v_batch + kv_head * v_head, v_row)
    if KEEP != ABSENT:
        keep_ptr += b * keep_batch + h * keep_head
        seen_ptr += b * seen_batch + h * seen_head
    if BIAS != ABSENT:
        bias_ptr += b * bias_batch + h * bias_head
    keep, bias = Mask(keep_ptr, keep_q, keep_k), Mask(bias_ptr, bias_q, bias_k)
    head = head_numbers(
        tau_ptr, tau_stride, noise_scale_ptr, noise_scale_stride, seed_ptr, seed_stride, seed_heads, h_offset, b, h,
        scale, threshold, survivor, kind,
    )  # fmt: skip

    i_first = q_place - q_shift
    row = i_first + tl.arange(0, BLOCK_Q)
    i = row[:, None]
    exists = (row >= 0) & (row < q_len)
    q = load_rows(Matrix(q_ptr + b * q_batch + h * q_head, q_row), i_first, q_len, D, BLOCK_Q, BLOCK_D)
    unmasked, last, k_end = key_places(i_first, field, kind)
    output_ptr += bh.to(tl.int64) * q_len * DV
    place = bh.to(tl.int64) * places + q_place + tl.arange(0, BLOCK_Q)

    if HARD:
        best = tl.full((BLOCK_Q, BLOCK_K), LOWEST, tl.float32)
        best_place = tl.full((BLOCK_Q, BLOCK_K), NO_KEY, tl.int32)
        if KEEP == ABSENT:
            best, best_place = _best_tiles(
                best, best_place, q, keys, keep, bias, head, field, i, q_place, 0, unmasked, kind, False
            )
        best, best_place = _best_tiles(
            best, best_place, q, keys, keep, bias, head, field, i, q_place, unmasked, last, kind, True
        )
        chosen = (best == tl.max(best, 1)[:, None]) & (best_place != NO_KEY)
        index = tl.min(tl.where(chosen, best_place - k_shift + tl.arange(0, BLOCK_K)[None, :], NO_KEY), 1)
        index = tl.where(index == NO_KEY, -1, index)
        if DROPOUT:
            q_position, k_position = q_origin + q_shift + row, k_origin + k_shift + index
            word = word_at(head.ka, head.kb, q_position, k_position, DROPOUT_STREAM)
            index = tl.where(word >= threshold.to(tl.uint32), index, -1)
        tl.store(index_ptr + place, tl.where(exists, index, -1))
        column = tl.arange(0, BLOCK_DV)
        present = (exists & (index >= 0))[:, None] & (column < DV)[None, :]
        output = tl.load(values.pointer + index.to(tl.int64)[:, None] * v_row + column[None, :], present, 0.0)
        if DROPOUT:
            output = output.to(tl.float32) * survivor
    else:
        output = tl.zeros((BLOCK_Q, BLOCK_DV), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        best = tl.full((BLOCK_Q,), LOWEST, tl.float32)
        if KEEP == ABSENT:
            output, total, best = _relaxed_tiles(
                output, total, best, q, keys, values, keep, bias, seen_ptr, head, field, i, q_place, 0, unmasked,
                k_end, kind, False,
            )  # fmt: skip
        output, total, best = _relaxed_tiles(
            output, total, best, q, keys, values, keep, bias, seen_ptr, head, field, i, q_place, unmasked, last,
            k_end, kind, True,
        )  # fmt: skip
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        lse = tl.where(empty, 0.0, best * head.exponent_scale + log2(total))
        tl.store(lse_ptr + place, tl.where(exists, lse, -LOWEST))  # no weight where there is no query
        output = output / total[:, None]
    store_rows(output_ptr, output, i_first, q_len, DV, BLOCK_Q, BLOCK_DV)
