"""The reference: every score and its noise in memory, each step as the formula has it. Slow; the oracle.

Z = (S + noise_scale * G) / tau        S = scale * Q K^T, soft-capped, plus bias
P = softmax(Z) over the keys that take part
soft: O = P V                          hard: O = V[argmax Z], and the gradient of its weights is the estimator's
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import noise
from ..estimators import choose
from .problem import AttentionInfo, AttentionProblem, compute_dtype


def attention(problem: AttentionProblem) -> AttentionInfo:
    """Attention as DESIGN's equations have it, differentiable by autograd in every float argument."""
    dtype = compute_dtype(problem.query.dtype)
    visible = problem.visible()
    group = problem.query.shape[1] // problem.value.shape[1]
    value = _hide(problem.value.to(dtype).repeat_interleave(group, dim=1), visible)
    scores = scores_of(problem, visible)
    sinks = problem.sinks
    if sinks is not None:
        sinks = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)

    chosen = choose(scores, visible, problem.choice, sinks)
    factor = _dropout(problem, dtype)
    weights = chosen.weights if factor is None else chosen.weights * factor
    indices = chosen.indices
    if indices is None:
        output = weights @ value
    else:
        output = _Gathered.apply(_gather(value, indices, weights.detach()), weights @ value.detach())
        indices = indices if problem.choice.top_k is not None else indices.squeeze(-1)
    out_dtype = problem.query.dtype
    return AttentionInfo(output.to(out_dtype), weights.to(out_dtype), indices, chosen.log_prob)


def scores_of(problem: AttentionProblem, visible: Tensor | None) -> Tensor:
    """S (B, H, Lq, Lk) in the dtype of computation; no meaning for keys not in ``problem.visible()``."""
    dtype = compute_dtype(problem.query.dtype)
    query = problem.query.to(dtype)
    group = query.shape[1] // problem.key.shape[1]
    key = _hide(problem.key.to(dtype).repeat_interleave(group, dim=1), visible)
    scores = query @ key.mT * problem.scale
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.bias is not None:
        bias = problem.bias.to(dtype)
        scores = scores + (bias if visible is None else torch.where(visible, bias, 0.0))
    return scores


class _Gathered(torch.autograd.Function):
    """Values gathered, as they are; their gradient goes to them and, as that of ``product``, to the weights."""

    @staticmethod
    def forward(ctx: Any, gathered: Tensor, product: Tensor) -> Tensor:
        return gathered.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def _hide(x: Tensor, visible: Tensor | None) -> Tensor:
    """``x`` (B, H, Lk, D) with zeros for keys that no query sees: padding may hold NaN or inf, and 0 * NaN is NaN."""
    if visible is None:
        return x
    return x.masked_fill(~visible.any(dim=-2)[..., None], 0.0)


def _gather(value: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Sum of the rows ``indices`` (..., k) of ``value`` times their weights. Reads no row of weight 0 or index -1."""
    output = torch.zeros_like(value[..., :1, :])
    for index in indices.split(1, dim=-1):
        row = index.clamp(min=0)
        weight = weights.gather(-1, row).masked_fill(index < 0, 0.0)
        picked = torch.take_along_dim(value, row, dim=-2)
        output = output + torch.where(weight > 0, picked * weight, 0.0)
    return output


def _dropout(problem: AttentionProblem, dtype: torch.dtype) -> Tensor | None:
    """What dropout multiplies the weights by: 0 or 1 / (1 - p)."""
    if problem.dropout_p == 0.0:
        return None
    assert problem.choice.where is not None
    return noise.dropout_factor(problem.dropout_p, problem.choice.where).to(dtype)
