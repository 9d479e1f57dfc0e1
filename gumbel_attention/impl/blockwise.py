"""Memory linear in the sequence: blocks of queries, and the noise computed again in the backward pass.

The formulas of the reference, a block of queries at a time, in one autograd function. Scores, noise and weights are
never kept: the backward pass computes them again from the inputs and the seed.

    dP = dO V^T        dZ = P * (dP - delta)       delta = rowsum(P * dP)
    dS = dZ / tau      dQ = scale * dS K           dK = scale * dS^T Q         dV = P^T dO, or one_hot^T dO
    dtau = -(1 / tau) sum dZ * Z                   dnoise_scale = (1 / tau) sum dZ * G

delta is dO . (P V) for a soft and for a straight-through choice. Dropout multiplies P where it meets V.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import noise
from .problem import AttentionProblem, compute_dtype

BLOCK_SCORES = 2**20
"""Scores of a block, over all examples and heads; a few tensors of this size live at a time."""


class Block(NamedTuple):
    """A block of queries, (B, H, rows, Lk), with the sinks' column after the keys in ``z`` and ``sampled``.

    ``z`` is finfo.min where a key does not take part; ``factor`` is dropout's and ``slope`` the soft cap's.
    """

    rows: slice
    query: Tensor
    visible: Tensor | None
    z: Tensor
    sampled: Tensor | None
    factor: Tensor | None
    slope: Tensor | None


def attention(problem: AttentionProblem, block_scores: int = BLOCK_SCORES) -> Tensor:
    """Attention's output, (B, H, Lq, Dv), differentiable once in every float argument.

    Args:
        problem: the checked arguments.
        block_scores: how many scores a block holds.
    """
    tensors = _tensors(problem)
    output: Tensor = _Blockwise.apply(_with_tensors(problem, [_detached(x) for x in tensors]), block_scores, *tensors)
    return output


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: AttentionProblem, block_scores: int, *tensors: Tensor | None) -> Tensor:
        ctx.problem = _with_tensors(problem, [None] * len(tensors))
        ctx.block_scores = block_scores
        ctx.save_for_backward(*tensors)
        query = problem.query
        key, value = _keys_and_values(problem)
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        for block in _blocks(problem, key, block_scores):
            output[:, :, block.rows] = _output(block, value, problem.choice.hard).to(query.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "second derivatives are not implemented in impl='blockwise': use impl='reference' with hard=False, or "
                "leave out create_graph=True."
            )
        problem = _with_tensors(ctx.problem, ctx.saved_tensors)
        key, value = _keys_and_values(problem)
        gradients = _Gradients(problem, key, value)
        for block in _blocks(problem, key, ctx.block_scores):
            gradients.add(block, grad[:, :, block.rows].to(key.dtype))
        return None, None, *gradients.result(ctx.needs_input_grad[2:])


class _Gradients:
    """Sums the gradients of all blocks."""

    def __init__(self, problem: AttentionProblem, key: Tensor, value: Tensor) -> None:
        self.problem, self.key, self.value = problem, key, value
        self.tensors = _tensors(problem)
        self.totals = [None if x is None else torch.zeros_like(x, dtype=key.dtype) for x in self.tensors]

    def add(self, block: Block, grad: Tensor) -> None:
        """Adds what a block of queries contributes; ``grad`` is that of its output, (B, H, rows, Dv)."""
        problem, choice, k_len = self.problem, self.problem.choice, self.key.shape[-2]
        d_query, d_key, d_value, d_bias, d_sinks, d_tau, d_noise_scale = self.totals
        assert d_query is not None
        assert d_key is not None
        assert d_value is not None
        relaxed = _relaxed(block)
        d_weights = _per_key(grad, self.value)
        weights = relaxed[..., :k_len]
        if block.factor is not None:
            d_weights, weights = d_weights * block.factor, weights * block.factor
        if choice.hard:
            _scatter(d_value, block, grad)
        else:
            d_value += _grouped(weights, self.key).mT @ _grouped(grad, self.key)
        d_weights = torch.nn.functional.pad(d_weights, (0, relaxed.shape[-1] - k_len))  # a sink has no value
        d_z = relaxed * (d_weights - (relaxed * d_weights).sum(-1, keepdim=True))
        if d_tau is not None:
            d_tau -= (d_z * block.z / choice.tau).sum_to_size(d_tau.shape)
        if d_noise_scale is not None and block.sampled is not None:
            d_noise_scale += (d_z * block.sampled / choice.tau).sum_to_size(d_noise_scale.shape)
        d_logits = d_z / choice.tau
        if d_sinks is not None:
            d_sinks += d_logits[..., -1].sum((0, 2))
        d_scores = d_logits[..., :k_len]
        if d_bias is not None:
            rows = block.rows if d_bias.shape[-2] > 1 else slice(None)
            part = d_bias[..., rows, :]
            part += d_scores.sum_to_size(part.shape)
        if block.slope is not None:
            d_scores = d_scores * block.slope
        d_scores = _grouped(d_scores, self.key) * problem.scale
        d_query[:, :, block.rows] = (d_scores @ self.key).reshape(block.query.shape)
        d_key += d_scores.mT @ _grouped(block.query, self.key)

    def result(self, wanted: tuple[bool, ...]) -> list[Tensor | None]:
        """The totals in the dtypes of the inputs; ``None`` for those not wanted."""
        return [
            total.to(x.dtype) if needed and total is not None and x is not None else None
            for needed, total, x in zip(wanted, self.totals, self.tensors, strict=True)
        ]


def _blocks(problem: AttentionProblem, key: Tensor, block_scores: int) -> Iterator[Block]:
    """The blocks of queries one after the other; nothing of a block is kept."""
    batch, heads, q_len, _ = problem.query.shape
    size = max(1, block_scores // max(1, batch * heads * key.shape[-2]))
    for start in range(0, q_len, size):
        yield _block(problem, key, slice(start, min(start + size, q_len)))


def _block(problem: AttentionProblem, key: Tensor, rows: slice) -> Block:
    choice, dtype = problem.choice, key.dtype
    query = problem.query[:, :, rows].to(dtype)
    scores, slope = _per_key(query, key) * problem.scale, None
    if problem.softcap is not None:
        capped = torch.tanh(scores / problem.softcap)
        scores, slope = problem.softcap * capped, 1.0 - capped.square()
    visible = problem.visible(rows)
    if problem.bias is not None:
        bias = problem.bias[..., rows, :] if problem.bias.shape[-2] > 1 else problem.bias
        scores = scores + bias.to(dtype)
    if problem.sinks is not None:
        column = problem.sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        if visible is not None:
            visible = torch.cat([visible.expand_as(scores), torch.ones_like(column, dtype=torch.bool)], dim=-1)
        scores = torch.cat([scores, column], dim=-1)
    where = None if choice.where is None else choice.where.rows(rows)
    sampled = None
    if choice.noise != "none":
        assert where is not None
        sampled = noise.sample(choice.noise, where).to(dtype)
        if problem.sinks is not None:
            sampled = torch.cat([sampled, noise.sample(choice.noise, where, sink=True).to(dtype)], dim=-1)
        scores = scores + choice.noise_scale * sampled
    z = scores / choice.tau
    if visible is not None:
        z = z.masked_fill(~visible, torch.finfo(dtype).min)
    factor = None
    if problem.dropout_p > 0.0:
        assert where is not None
        factor = noise.dropout_factor(problem.dropout_p, where).to(dtype)
    return Block(rows, query, visible, z, sampled, factor, slope)


def _relaxed(block: Block) -> Tensor:
    """softmax(Z); exactly 0 for keys that do not take part, and for rows in which none does."""
    relaxed = torch.softmax(block.z, dim=-1)
    return relaxed if block.visible is None else relaxed.masked_fill(~block.visible, 0.0)


def _output(block: Block, value: Tensor, hard: bool) -> Tensor:
    """(B, H, rows, Dv): values averaged by the weights, or gathered."""
    if not hard:
        weights = _relaxed(block)[..., : value.shape[-2]]
        weights = weights if block.factor is None else weights * block.factor
        return (_grouped(weights, value) @ value).reshape(*weights.shape[:-1], value.shape[-1])
    row, weight = _picks(block, value)
    picked = value.flatten(0, 2)[row] * weight[..., None]
    return torch.where(weight[..., None] > 0, picked, 0.0)


def _picks(block: Block, value: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen row of ``value.flatten(0, 2)`` for each query, and its weight: 1, dropout's, or 0 for no key."""
    (batch, kv_heads, k_len, _), heads = value.shape, block.z.shape[1]
    top = block.z.argmax(dim=-1)
    chosen = top < k_len
    if block.visible is not None:
        chosen = chosen & block.visible.any(dim=-1)
    top = top.clamp(max=k_len - 1)
    weight = chosen.to(value.dtype)
    if block.factor is not None:
        weight = weight * block.factor.gather(-1, top[..., None])[..., 0]
    head = torch.arange(batch * heads, device=top.device).reshape(batch, heads, 1) // (heads // kv_heads)
    return head * k_len + top, weight


def _scatter(d_value: Tensor, block: Block, grad: Tensor) -> None:
    """Adds the gradient of the chosen values in place."""
    row, weight = _picks(block, d_value)
    d_value.flatten(0, 2).index_add_(0, row.flatten(), (grad * weight[..., None]).flatten(0, 2))


def _per_key(x: Tensor, y: Tensor) -> Tensor:
    """x y^T for x (B, H, rows, D) and y (B, Hk, Lk, D): (B, H, rows, Lk)."""
    return (_grouped(x, y) @ y.mT).reshape(*x.shape[:-1], y.shape[-2])


def _grouped(x: Tensor, y: Tensor) -> Tensor:
    """(B, H, rows, D) as (B, Hk, H / Hk * rows, D), to be multiplied with a tensor of Hk heads."""
    group = x.shape[1] // y.shape[1]
    return x.reshape(x.shape[0], y.shape[1], group * x.shape[2], x.shape[3])


def _keys_and_values(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Keys and values in the dtype of the statistics, zero where no query sees them."""
    key, value = problem.hidden_keys_and_values()
    dtype = compute_dtype(problem.query.dtype)
    return key.to(dtype), value.to(dtype)


def _tensors(problem: AttentionProblem) -> list[Tensor | None]:
    """The arguments that may want a gradient, in the order the autograd function takes them."""
    choice = problem.choice
    scalars = [x if isinstance(x, Tensor) else None for x in (choice.tau, choice.noise_scale)]
    return [problem.query, problem.key, problem.value, problem.bias, problem.sinks, *scalars]


def _with_tensors(problem: AttentionProblem, tensors: Any) -> AttentionProblem:
    """The problem with other tensors in those places; a ``None`` leaves a number for tau or noise_scale as it is."""
    *data, tau, noise_scale = tensors
    names = ("query", "key", "value", "bias", "sinks")
    choice = problem.choice
    return dataclasses.replace(
        problem,
        **dict(zip(names, data, strict=True)),
        choice=dataclasses.replace(
            choice,
            tau=_number(choice.tau) if tau is None else tau,
            noise_scale=_number(choice.noise_scale) if noise_scale is None else noise_scale,
        ),
    )


def _number(x: float | Tensor) -> float:
    """A number as it is; a placeholder for a tensor that is kept elsewhere."""
    return math.nan if isinstance(x, Tensor) else x


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
