"""The row kernel of the backward pass: the gradients of queries, tau and noise_scale; delta for the column kernel.

    dP = dO V^T        dZ = P * (dP - delta)        dQ = scale / tau * dZ K

With relaxed weights, L is known from the forward pass and delta = dO . O. A hard forward pass leaves neither: there
both are sums over keys, and the gradients are put together at the end from sums relative to a guess of delta.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LOWEST, dot, exp2, log2, product
from .noise import LN2
from .tiles import (
    ABSENT,
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

NEGLIGIBLE = tl.constexpr(-1000.0)
"""Exponents below it weigh nothing; a bound that keeps 0 * -inf out."""


@triton.jit
def _scores(
    q, d_output, keys, values, keep, bias, seen_ptr, head, field, i, q_place, k_place, k_end, kind: tl.constexpr
):  # fmt: skip
    """U of a tile and n, the gradient dP of its weights, the keys, and their indices."""
    start = k_place - field.k_shift
    j = (start + tl.arange(0, kind.K))[None, :]
    k = load_seen_rows(keys, start, k_end, seen_ptr, kind.D, kind.K, kind.BLOCK_D, kind.KEEP != ABSENT)
    v = load_seen_rows(values, start, k_end, seen_ptr, kind.DV, kind.K, kind.BLOCK_DV, kind.KEEP != ABSENT)
    n = noise_tile(head, field, q_place, k_place, kind, False)
    u = perturbed(product(q, tl.trans(k), kind.Q, kind.K), n, head, bias, i, j, field, kind)
    d_weights = product(d_output, tl.trans(v), kind.Q, kind.K)
    if kind.DROPOUT:
        kept = survivors(head, field, q_place, k_place, kind, False)
        d_weights = tl.where(kept, d_weights * head.survivor, 0.0)
    return u, n, d_weights, k, j


@triton.jit
def _relaxed_tiles(
    d_q, dz_sum, z_sum, pz_sum, n_sum, pn_sum, q, d_output, lse, delta, keys, values, keep, bias, seen_ptr, head,
    field, i, q_place, first, last, k_end, kind: tl.constexpr, D_TAU: tl.constexpr, D_NOISE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys at places ``first ... last`` to dZ K and to the sums of dZ, dZ * Z, P * Z, dZ * n, P * n."""
    for k_place in tl.range(first, last, kind.K):
        u, n, d_weights, k, j = _scores(
            q, d_output, keys, values, keep, bias, seen_ptr, head, field, i, q_place, k_place, k_end, kind
        )
        exponent = u * head.exponent_scale - lse[:, None]
        if MASKED:
            exponent = only_visible(exponent, keep, i, j, field, kind)
        weights = exp2(exponent)
        d_z = weights * (d_weights - delta[:, None])
        if D_TAU or D_NOISE:
            dz_sum += tl.sum(d_z, 1)
        if D_TAU:
            z_sum += tl.sum(d_z * exponent, 1)
            pz_sum += tl.sum(weights * exponent, 1)
        if D_NOISE:
            n_sum += tl.sum(d_z * n, 1)
            pn_sum += tl.sum(weights * n, 1)
        d_q = dot(d_z.to(k.dtype), k, d_q)
    return d_q, dz_sum, z_sum, pz_sum, n_sum, pn_sum


@triton.jit
def _hard_tiles(
    d_q, weighted_k, total, delta_sum, guess, best, z_sum, pz_sum, n_sum, pn_sum, q, d_output, keys, values, keep,
    bias, seen_ptr, head, field, i, q_place, first, last, k_end, kind: tl.constexpr, D_TAU: tl.constexpr,
    D_NOISE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys at places ``first ... last`` to sums relative to ``best``, the largest u so far.

    With p the unnormalised weights and e = p * (dP - delta): sums of e K, p K, p, p * dP, e * Z, p * Z, e * n, p * n.
    ``guess`` is delta over the keys so far, and the sums of e follow it: were it left as it was in the first tile, the
    sums of e and of p would cancel in the end, and their operands are rounded to the dtype of the keys.
    """
    for k_place in tl.range(first, last, kind.K):
        u, n, d_weights, k, j = _scores(
            q, d_output, keys, values, keep, bias, seen_ptr, head, field, i, q_place, k_place, k_end, kind
        )
        if MASKED:
            u = only_visible(u, keep, i, j, field, kind)
        higher = tl.maximum(best, tl.max(u, 1))
        reference = higher
        if MASKED:
            reference = tl.where(higher == LOWEST, 0.0, higher)
        exponent = u * head.exponent_scale - (reference * head.exponent_scale)[:, None]
        weights = exp2(exponent)
        rescale = exp2((best - reference) * head.exponent_scale)
        shift = tl.where(total == 0.0, 0.0, (best - reference) * head.exponent_scale)
        pz_sum = (pz_sum + shift * total) * rescale
        z_sum *= rescale  # e sums to 0: no shift
        pn_sum *= rescale
        n_sum *= rescale
        best = higher
        total = total * rescale + tl.sum(weights, 1)
        delta_sum = delta_sum * rescale + tl.sum(weights * d_weights, 1)
        corrected = delta_sum / tl.maximum(total, 1.0e-30)
        change = corrected - guess
        guess = corrected
        e = weights * (d_weights - guess[:, None])
        if D_TAU:
            if MASKED:
                exponent = tl.maximum(exponent, NEGLIGIBLE)
            z_sum += tl.sum(e * exponent, 1) - change * pz_sum
            pz_sum += tl.sum(weights * exponent, 1)
        if D_NOISE:
            n_sum += tl.sum(e * n, 1) - change * pn_sum
            pn_sum += tl.sum(weights * n, 1)
        d_q = dot(e.to(k.dtype), k, (d_q - change[:, None] * weighted_k) * rescale[:, None])
        weighted_k = dot(weights.to(k.dtype), k, weighted_k * rescale[:, None])
    return d_q, weighted_k, total, delta_sum, guess, best, z_sum, pz_sum, n_sum, pn_sum


@triton.jit(do_not_specialize=VARYING)
def rows_kernel(
    q_ptr, k_ptr, v_ptr, output_ptr, lse_ptr, delta_ptr, d_output_ptr, d_q_ptr, d_tau_ptr, d_noise_ptr, keep_ptr,
    bias_ptr, seen_ptr, tau_ptr, noise_scale_ptr, seed_ptr, do_batch, do_head, do_row, q_batch, q_head, q_row, k_batch,
    k_head, k_row, v_batch, v_head, v_row, keep_batch, keep_head, keep_q, keep_k, bias_batch, bias_head, bias_q,
    bias_k, seen_batch, seen_head, tau_stride, noise_scale_stride, seed_stride, seed_heads, h_offset, heads, group,
    q_len, k_len, places, q_shift, k_shift, q_origin, k_origin, reach, scale, threshold, survivor, D: tl.constexpr,
    BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HARD: tl.constexpr, NOISE: tl.constexpr, CAUSAL: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, D_TAU: tl.constexpr, D_NOISE: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head."""
    kind: tl.constexpr = Kind(D, BLOCK_D, DV, BLOCK_DV, BLOCK_Q, BLOCK_K, NOISE, CAUSAL, KEEP, BIAS, DROPOUT)
    field = Field(q_len, k_len, q_shift, k_shift, q_origin, k_origin, reach)
    tiles = tl.cdiv(q_len + q_shift, BLOCK_Q)
    tile = tiles - 1 - tl.program_id(0) % tiles  # under a causal mask the long rows come first
    q_place = tile * BLOCK_Q
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
    row_base = bh.to(tl.int64) * q_len
    place = bh.to(tl.int64) * places + q_place + tl.arange(0, BLOCK_Q)
    q = load_rows(Matrix(q_ptr + b * q_batch + h * q_head, q_row), i_first, q_len, D, BLOCK_Q, BLOCK_D)
    d_output = Matrix(d_output_ptr + b * do_batch + h * do_head, do_row)
    d_output = load_rows(d_output, i_first, q_len, DV, BLOCK_Q, BLOCK_DV)
    unmasked, last, k_end = key_places(i_first, field, kind)
    d_q = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    z_sum = tl.zeros((BLOCK_Q,), tl.float32)
    n_sum = tl.zeros((BLOCK_Q,), tl.float32)

    if HARD:
        weighted_k = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        delta_sum = tl.zeros((BLOCK_Q,), tl.float32)
        guess = tl.zeros((BLOCK_Q,), tl.float32)
        best = tl.full((BLOCK_Q,), LOWEST, tl.float32)
        pz_sum = tl.zeros((BLOCK_Q,), tl.float32)
        pn_sum = tl.zeros((BLOCK_Q,), tl.float32)
        if KEEP == ABSENT:
            d_q, weighted_k, total, delta_sum, guess, best, z_sum, pz_sum, n_sum, pn_sum = _hard_tiles(
                d_q, weighted_k, total, delta_sum, guess, best, z_sum, pz_sum, n_sum, pn_sum, q, d_output, keys,
                values, keep, bias, seen_ptr, head, field, i, q_place, 0, unmasked, k_end, kind, D_TAU, D_NOISE, False,
            )  # fmt: skip
        d_q, weighted_k, total, delta_sum, guess, best, z_sum, pz_sum, n_sum, pn_sum = _hard_tiles(
            d_q, weighted_k, total, delta_sum, guess, best, z_sum, pz_sum, n_sum, pn_sum, q, d_output, keys, values,
            keep, bias, seen_ptr, head, field, i, q_place, unmasked, last, k_end, kind, D_TAU, D_NOISE, True,
        )  # fmt: skip
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        lse = tl.where(empty, 0.0, best * head.exponent_scale + log2(total))
        tl.store(lse_ptr + place, tl.where(exists, lse, -LOWEST))  # no weight where there is no query
        delta = guess
        d_q /= total[:, None]
        z_sum /= total
        n_sum /= total
    else:
        output = Matrix(output_ptr + row_base * DV, DV)
        output = load_rows(output, i_first, q_len, DV, BLOCK_Q, BLOCK_DV)
        delta = tl.sum(output.to(tl.float32) * d_output.to(tl.float32), 1)
        lse = tl.load(lse_ptr + place)
        dz_sum = tl.zeros((BLOCK_Q,), tl.float32)
        pz_sum = tl.zeros((BLOCK_Q,), tl.float32)
        pn_sum = tl.zeros((BLOCK_Q,), tl.float32)
        if KEEP == ABSENT:
            d_q, dz_sum, z_sum, pz_sum, n_sum, pn_sum = _relaxed_tiles(
                d_q, dz_sum, z_sum, pz_sum, n_sum, pn_sum, q, d_output, lse, delta, keys, values, keep, bias, seen_ptr,
                head, field, i, q_place, 0, unmasked, k_end, kind, D_TAU, D_NOISE, False,
            )  # fmt: skip
        d_q, dz_sum, z_sum, pz_sum, n_sum, pn_sum = _relaxed_tiles(
            d_q, dz_sum, z_sum, pz_sum, n_sum, pn_sum, q, d_output, lse, delta, keys, values, keep, bias, seen_ptr,
            head, field, i, q_place, unmasked, last, k_end, kind, D_TAU, D_NOISE, True,
        )  # fmt: skip
        z_sum -= dz_sum * pz_sum  # dZ sums to 0; here it sums to the rounding error of delta
        n_sum -= dz_sum * pn_sum
    tl.store(delta_ptr + place, delta)
    store_rows(d_q_ptr + row_base * D, d_q * (scale / head.tau), i_first, q_len, D, BLOCK_Q, BLOCK_D)
    unit = -LN2 / head.tau  # exponents are log2(e) * Z, and G is -ln(2) * n, up to a constant
    if D_TAU:
        tl.store(d_tau_ptr + bh * tiles + tile, tl.sum(tl.where(exists, z_sum, 0.0)) * unit)
    if D_NOISE:
        tl.store(d_noise_ptr + bh * tiles + tile, tl.sum(tl.where(exists, n_sum, 0.0)) * unit)
