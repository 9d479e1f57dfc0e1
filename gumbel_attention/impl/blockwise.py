"""Memory linear in the sequence: blocks of queries, and the noise computed again in the backward pass.

The formulas of the reference, a block of queries at a time, in one autograd function. Scores, noise and weights are
never kept: the backward pass computes them again from the inputs and the seed.

    dW = dO V^T                                    gradient of the weights, which the softmax or the estimator turns
    dS, dtau, dnoise_scale                         into those of the scores, the temperature and the noise scale
    dQ = scale * dS K        dK = scale * dS^T Q   dV = W^T dO, for a hard choice by its indices

Dropout multiplies the weights W where they meet V.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import noise
from ..choice import Row, log_prob, pick, relaxed, row_of, shares, without_sink
from ..estimators import pull_back, surrogates
from .problem import AttentionInfo, AttentionProblem, compute_dtype

BLOCK_SCORES = 2**20
"""Scores of a block, over all examples and heads; a few tensors of this size live at a time."""


class Block(NamedTuple):
    """A block of queries, (B, H, rows, Lk), with the sinks' column after the keys in ``scores`` and ``row``.

    ``scores`` are 0 where a key does not take part; ``factor`` is dropout's and ``slope`` the soft cap's.
    """

    rows: slice
    query: Tensor
    scores: Tensor
    row: Row
    factor: Tensor | None
    slope: Tensor | None


def attention(problem: AttentionProblem, block_scores: int = BLOCK_SCORES) -> Tensor:
    """Attention's output, (B, H, Lq, Dv), differentiable once in every float argument.

    Args:
        problem: the checked arguments.
        block_scores: how many scores a block holds.
    """
    return _attention(problem, block_scores, False)[0]


def attention_with_choice(problem: AttentionProblem, block_scores: int = BLOCK_SCORES) -> AttentionInfo:
    """:func:`attention` with the keys of a hard choice and their log-probability; without weights."""
    choice = problem.choice
    sampled = choice.samples_softmax
    output, indices, log_probs = _attention(problem, block_scores, sampled)
    if not choice.hard:
        return AttentionInfo(output, None, None, None)
    return AttentionInfo(
        output, None, indices if choice.top_k is not None else indices.squeeze(-1), log_probs if sampled else None
    )


def _attention(problem: AttentionProblem, block_scores: int, with_log_prob: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output, indices (B, H, Lq, k) and log-probabilities (B, H, Lq); the last two empty where there are none."""
    tensors = _tensors(problem)
    constants = _with_tensors(problem, [_detached(x) for x in tensors])
    result: tuple[Tensor, Tensor, Tensor] = _Blockwise.apply(constants, block_scores, with_log_prob, *tensors)
    return result


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: AttentionProblem, block_scores: int, with_log_prob: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.problem = _with_tensors(problem, [None] * len(tensors))
        ctx.block_scores, ctx.with_log_prob = block_scores, with_log_prob
        ctx.save_for_backward(*tensors)
        query, choice = problem.query, problem.choice
        key, value = _keys_and_values(problem)
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        rows = query.shape[:-1]
        indices = query.new_empty((*rows, choice.top_k or 1) if choice.hard else (0,), dtype=torch.int64)
        log_probs = query.new_empty(rows if with_log_prob else (0,), dtype=key.dtype)
        for block in _blocks(problem, key, block_scores):
            if not choice.hard:
                output[:, :, block.rows] = _averaged(_weights(block), value).to(query.dtype)
                continue
            chosen = pick(block.scores, block.row)
            output[:, :, block.rows] = _gathered(block, chosen, value).to(query.dtype)
            indices[:, :, block.rows] = without_sink(chosen, value.shape[-2])
            if with_log_prob:
                log_probs[:, :, block.rows] = _log_prob(block, chosen)(*_arguments(block))
        ctx.mark_non_differentiable(indices)
        return output, indices, log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any, grad_log_prob: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "second derivatives are not implemented in impl='blockwise': use impl='reference' with hard=False, or "
                "leave out create_graph=True."
            )
        problem = _with_tensors(ctx.problem, ctx.saved_tensors)
        key, value = _keys_and_values(problem)
        gradients = _Gradients(problem, key, value)
        for block in _blocks(problem, key, ctx.block_scores):
            of_log_prob = grad_log_prob[:, :, block.rows] if ctx.with_log_prob else None
            gradients.add(block, grad[:, :, block.rows].to(key.dtype), of_log_prob)
        return None, None, None, *gradients.result(ctx.needs_input_grad[3:])


class _Gradients:
    """Sums the gradients of all blocks."""

    def __init__(self, problem: AttentionProblem, key: Tensor, value: Tensor) -> None:
        self.problem, self.key, self.value = problem, key, value
        self.tensors = _tensors(problem)
        self.totals = [None if x is None else torch.zeros_like(x, dtype=key.dtype) for x in self.tensors]

    def add(self, block: Block, grad: Tensor, grad_log_prob: Tensor | None) -> None:
        """Adds what a block of queries contributes.

        Args:
            block: the block.
            grad: gradient of its output, (B, H, rows, Dv).
            grad_log_prob: gradient of the log-probabilities, (B, H, rows), where they were asked for.
        """
        problem, k_len = self.problem, self.key.shape[-2]
        d_query, d_key, d_value, d_bias, d_sinks, d_tau, d_noise_scale = self.totals
        assert d_query is not None
        assert d_key is not None
        assert d_value is not None
        d_weights = _per_key(grad, self.value)
        if block.factor is not None:
            d_weights = d_weights * block.factor
        d_weights = torch.nn.functional.pad(d_weights, (0, block.scores.shape[-1] - k_len))  # a sink has no value
        if not problem.choice.hard:
            d_value += _grouped(_weights(block), self.key).mT @ _grouped(grad, self.key)
            parts = pull_back([_relaxed(block)], *_arguments(block), d_weights)
        else:
            chosen = pick(block.scores, block.row)
            _scatter(d_value, block, chosen, grad)
            parts = pull_back(surrogates(block.scores, chosen, block.row), *_arguments(block), d_weights)
            if grad_log_prob is not None:
                _add(parts, pull_back([_log_prob(block, chosen)], *_arguments(block), grad_log_prob))
        d_logits, of_tau, of_noise_scale = parts
        assert d_logits is not None
        for total, part in ((d_tau, of_tau), (d_noise_scale, of_noise_scale)):
            if total is not None and part is not None:
                total += part
        if d_sinks is not None:
            d_sinks += d_logits[..., -1].sum((0, 2))
        d_scores = d_logits[..., :k_len]
        if d_bias is not None:
            rows = block.rows if d_bias.shape[-2] > 1 else slice(None)
            d_rows = d_bias[..., rows, :]
            d_rows += d_scores.sum_to_size(d_rows.shape)
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
    if problem.bias is not None:
        bias = problem.bias[..., rows, :] if problem.bias.shape[-2] > 1 else problem.bias
        scores = scores + bias.to(dtype)
    sinks = problem.sinks
    if sinks is not None:
        sinks = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
    where = None if choice.where is None else choice.where.rows(rows)
    scores, row = row_of(scores, problem.visible(rows), choice, where, sinks)
    factor = None
    if problem.dropout_p > 0.0:
        assert where is not None
        factor = noise.dropout_factor(problem.dropout_p, where).to(dtype)
    return Block(rows, query, scores, row, factor, slope)


def _arguments(block: Block) -> tuple[Tensor, float | Tensor, float | Tensor]:
    """What a surrogate is a function of."""
    return block.scores, block.row.choice.tau, block.row.choice.noise_scale


def _relaxed(block: Block) -> Any:
    return lambda scores, tau, noise_scale: relaxed(scores, tau, noise_scale, block.row)


def _log_prob(block: Block, chosen: Tensor) -> Any:
    return lambda scores, tau, noise_scale: log_prob(scores, noise_scale, chosen, block.row)


def _add(totals: list[Tensor | None], more: list[Tensor | None]) -> None:
    for i, (total, part) in enumerate(zip(totals, more, strict=True)):
        totals[i] = total if total is None or part is None else total + part


def _weights(block: Block) -> Tensor:
    """Weights (B, H, rows, Lk) of a soft choice, after dropout."""
    weights = relaxed(*_arguments(block), block.row)[..., : block.scores.shape[-1] - block.row.sink]
    return weights if block.factor is None else weights * block.factor


def _averaged(weights: Tensor, value: Tensor) -> Tensor:
    """(B, H, rows, Dv): values averaged by the weights."""
    return (_grouped(weights, value) @ value).reshape(*weights.shape[:-1], value.shape[-1])


def _gathered(block: Block, chosen: Tensor, value: Tensor) -> Tensor:
    """(B, H, rows, Dv): the values chosen; of a key without weight nothing is read."""
    output = value.new_zeros(*chosen.shape[:-1], value.shape[-1])
    for row, weight in _picks(block, chosen, value):
        output += torch.where(weight[..., None] > 0, value.flatten(0, 2)[row] * weight[..., None], 0.0)
    return output


def _scatter(d_value: Tensor, block: Block, chosen: Tensor, grad: Tensor) -> None:
    """Adds the gradient of the chosen values in place."""
    for row, weight in _picks(block, chosen, d_value):
        d_value.flatten(0, 2).index_add_(0, row.flatten(), (grad * weight[..., None]).flatten(0, 2))


def _picks(block: Block, chosen: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each pick: its row of ``value.flatten(0, 2)``, and its weight with dropout, 0 for no key or a sink."""
    (batch, kv_heads, k_len, _), heads = value.shape, chosen.shape[1]
    head = torch.arange(batch * heads, device=value.device).reshape(batch, heads, 1) // (heads // kv_heads)
    weights = shares(chosen, block.scores.dtype).masked_fill(chosen >= k_len, 0.0)
    for index, weight in zip(chosen.split(1, dim=-1), weights.split(1, dim=-1), strict=True):
        key = index.clamp(min=0, max=k_len - 1)
        if block.factor is not None:
            weight = weight * block.factor.gather(-1, key)
        yield head * k_len + key[..., 0], weight[..., 0]


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
