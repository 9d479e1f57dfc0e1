"""The column kernel of the backward pass: the gradients of keys and values, summed over a group of query heads.

    dV = P^T dO        dK = scale / tau * dZ^T Q        dZ = P * (dP - delta)

Tiles are transposed, keys by queries, so that weights multiply queries and output gradients from registers. The
values' gradient of a hard choice is no matter of tiles: each output sends its own to one value.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import dot, exp2, product
from .tiles import (
    ABSENT,
    VARYING,
    Field,
    Kind,
    Mask,
    Matrix,
    head_numbers,
    load_rows,
    load_seen_rows,
    noise_tile,
    only_visible,
    perturbed,
    store_rows,
    survivors,
    wide_indices,
)


@triton.jit
def _tiles(
    d_k, d_v, k, v, queries, d_outputs, lse_ptr, delta_ptr, keep, bias, head, field, j, k_place, first,
    last, kind: tl.constexpr, HARD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the queries at places ``first ... last`` of one head to dZ^T Q and to the gradient of the values."""
    for q_place in tl.range(first, last, kind.Q):
        start = q_place - field.q_shift
        column = tl.arange(0, kind.Q)
        i = (start + column)[None, :]
        q = load_rows(queries, start, field.q_len, kind.D, kind.Q, kind.BLOCK_D)
        d_output = load_rows(d_outputs, start, field.q_len, kind.DV, kind.Q, kind.BLOCK_DV)
        lse = tl.load(lse_ptr + q_place + column)
        delta = tl.load(delta_ptr + q_place + column)
        n = noise_tile(head, field, q_place, k_place, kind, True)
        u = perturbed(product(k, tl.trans(q), kind.K, kind.Q), n, head, bias, i, j, field, kind)
        exponent = u * head.exponent_scale - lse[None, :]
        if MASKED:
            exponent = only_visible(exponent, keep, i, j, field, kind)
        weights = exp2(exponent)
        used = weights
        d_weights = product(v, tl.trans(d_output), kind.K, kind.Q)
        if kind.DROPOUT:
            kept = survivors(head, field, q_place, k_place, kind, True)
            used = tl.where(kept, used * head.survivor, 0.0)
            d_weights = tl.where(kept, d_weights * head.survivor, 0.0)
        if not HARD:
            d_v = dot(used.to(d_output.dtype), d_output, d_v)
        d_z = weights * (d_weights - delta[None, :])
        d_k = dot(d_z.to(q.dtype), q, d_k)
    return d_k, d_v


@triton.jit
def _query_places(j_first, field, kind: tl.constexpr):
    """Where the places of queries that see keys ``j_first ...`` begin, and from where on all see all of these."""
    first = 0
    unmasked = 0
    if kind.CAUSAL:
        seen_from = tl.maximum(tl.maximum(j_first, 0) - field.reach, 0)
        all_from = tl.maximum(tl.minimum(j_first + kind.K, field.k_len) - 1 - field.reach, 0)
        first = (seen_from + field.q_shift) // kind.Q * kind.Q
        unmasked = tl.cdiv(all_from + field.q_shift, kind.Q) * kind.Q
    return first, unmasked


@triton.jit(do_not_specialize=VARYING)
def columns_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, d_output_ptr, d_k_ptr, d_v_ptr, keep_ptr, bias_ptr, seen_ptr,
    tau_ptr, noise_scale_ptr, seed_ptr, do_batch, do_head, do_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, keep_batch, keep_head, keep_q, keep_k, bias_batch, bias_head, bias_q, bias_k, seen_batch,
    seen_head, tau_stride, noise_scale_stride, seed_stride, seed_heads, h_offset, heads, group, q_len, k_len, places,
    q_shift, k_shift, q_origin, k_origin, reach, scale, threshold, survivor, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HARD: tl.constexpr,
    NOISE: tl.constexpr, CAUSAL: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A tile of keys of one key head."""
    kind: tl.constexpr = Kind(D, BLOCK_D, DV, BLOCK_DV, BLOCK_Q, BLOCK_K, NOISE, CAUSAL, KEEP, BIAS, DROPOUT)
    field = Field(q_len, k_len, q_shift, k_shift, q_origin, k_origin, reach)
    tiles = tl.cdiv(k_len + k_shift, BLOCK_K)
    k_place = (tl.program_id(0) % tiles) * BLOCK_K
    bh = tl.program_id(0) // tiles
    kv_heads = heads // group
    b, kv_head, first_head = wide_indices(bh // kv_heads, bh % kv_heads, bh % kv_heads * group)
    j_first = k_place - k_shift
    j = (j_first + tl.arange(0, BLOCK_K))[:, None]
    first, unmasked = _query_places(j_first, field, kind)
    last = q_len + q_shift

    keys = Matrix(k_ptr + b * k_batch + kv_head * k_head, k_row)
    values = Matrix(v_ptr + b * v_batch + kv_head * v_head, v_row)
    if KEEP != ABSENT:
        seen_ptr += b * seen_batch + kv_head * seen_head
    k_end = k_len
    if CAUSAL:
        k_end = tl.maximum(tl.minimum(k_len, q_len + reach), 0)  # later keys no query sees
    k = load_seen_rows(keys, j_first, k_end, seen_ptr, D, BLOCK_K, BLOCK_D, KEEP != ABSENT)
    v = load_seen_rows(values, j_first, k_end, seen_ptr, DV, BLOCK_K, BLOCK_DV, KEEP != ABSENT)
    d_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32) if not HARD else 0.0
    d_k_tau = tl.load(tau_ptr + first_head * tau_stride)
    for member in tl.range(0, group):
        h = first_head + member
        head = head_numbers(
            tau_ptr, tau_stride, noise_scale_ptr, noise_scale_stride, seed_ptr, seed_stride, seed_heads, h_offset, b,
            h, scale, threshold, survivor, kind,
        )  # fmt: skip
        d_k = d_k * (head.tau / d_k_tau)  # the sum so far, as if it had this head's tau
        d_k_tau = head.tau
        queries = Matrix(q_ptr + b * q_batch + h * q_head, q_row)
        d_outputs = Matrix(d_output_ptr + b * do_batch + h * do_head, do_row)
        row_place = (b * heads + h) * places
        keep = Mask(keep_ptr, keep_q, keep_k)
        bias = Mask(bias_ptr, bias_q, bias_k)
        if KEEP != ABSENT:
            keep = Mask(keep_ptr + b * keep_batch + h * keep_head, keep_q, keep_k)
        if BIAS != ABSENT:
            bias = Mask(bias_ptr + b * bias_batch + h * bias_head, bias_q, bias_k)
        if KEEP != ABSENT:
            d_k, d_v = _tiles(
                d_k, d_v, k, v, queries, d_outputs, lse_ptr + row_place, delta_ptr + row_place, keep, bias,
                head, field, j, k_place, first, last, kind, HARD, True,
            )  # fmt: skip
        else:
            if CAUSAL:
                d_k, d_v = _tiles(
                    d_k, d_v, k, v, queries, d_outputs, lse_ptr + row_place, delta_ptr + row_place, keep, bias,
                    head, field, j, k_place, first, tl.minimum(unmasked, last), kind, HARD, True,
                )  # fmt: skip
            d_k, d_v = _tiles(
                d_k, d_v, k, v, queries, d_outputs, lse_ptr + row_place, delta_ptr + row_place, keep, bias,
                head, field, j, k_place, unmasked, last, kind, HARD, False,
            )  # fmt: skip
    row_base = bh.to(tl.int64) * k_len
    store_rows(d_k_ptr + row_base * D, d_k * (scale / d_k_tau), j_first, k_len, D, BLOCK_K, BLOCK_D)
    if not HARD:
        store_rows(d_v_ptr + row_base * DV, d_v, j_first, k_len, DV, BLOCK_K, BLOCK_DV)
