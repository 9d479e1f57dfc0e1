"""The reference: every score and its noise in memory, each step as the formula has it. Slow; the oracle.

Z = (S + noise_scale * G) / tau        S = scale * Q K^T, soft-capped, plus bias
P = softmax(Z) over the keys that take part
soft: O = P V                          hard: O = V[argmax Z], with the gradient of P for the choice
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import noise
from .problem import AttentionInfo, AttentionProblem, Choice, compute_dtype


class Chosen(NamedTuple):
    """Weights before dropout, (B, H, Lq, Lk): relaxed ones, and for a hard choice the one-hot beside them."""

    relaxed: Tensor
    one_hot: Tensor | None
    indices: Tensor | None
    log_prob: Tensor | None


class _StraightThrough(torch.autograd.Function):
    """Forward ``hard``, exactly; backward the incoming gradient to ``hard`` and ``relaxed`` alike.

    ``hard + relaxed - relaxed.detach()`` has the same gradient but a rounded value, and turns inf into NaN.
    """

    @staticmethod
    def forward(ctx: Any, hard: Tensor, relaxed: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "second derivatives of a straight-through choice are not defined here: its first one is an estimate, "
                "not the derivative of its value. Use hard=False, or leave out create_graph=True."
            )
        return grad, grad


def straight_through(hard: Tensor, relaxed: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``relaxed`` (Bengio et al. 2013) added to its own."""
    result: Tensor = _StraightThrough.apply(hard, relaxed)
    return result


def masked_softmax(z: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the visible keys. Invisible ones get exactly 0, and so does a row that sees none."""
    if visible is None:
        return torch.softmax(z, dim=-1)
    lowest = z.masked_fill(~visible, torch.finfo(z.dtype).min)
    return torch.softmax(lowest, dim=-1).masked_fill(~visible, 0.0)


def choose(scores: Tensor, visible: Tensor | None, choice: Choice, sinks: Tensor | None = None) -> Chosen:
    """Noise, temperature and the choice over the last dimension.

    Args:
        scores: (B, H, Lq, Lk), float32 or float64; invisible entries may hold anything.
        visible: bool, broadcasts against the scores; ``None`` where every key takes part.
        choice: temperature, noise, and whether the choice is hard.
        sinks: scores (B, H, Lq, 1) of a column that takes part but carries no value.
    """
    if sinks is not None:
        return _without_sink(scores, visible, choice, sinks)
    if visible is not None:
        scores = scores.masked_fill(~visible, 0.0)
    return _choose(scores, visible, choice, _noise(scores, choice))


def _choose(scores: Tensor, visible: Tensor | None, choice: Choice, sampled: Tensor | None) -> Chosen:
    logits = scores if sampled is None else scores + choice.noise_scale * sampled
    z = logits / choice.tau
    relaxed = masked_softmax(z, visible)
    if not choice.hard:
        return Chosen(relaxed, None, None, None)
    top = (z if visible is None else z.masked_fill(~visible, -torch.inf)).detach().argmax(dim=-1, keepdim=True)
    one_hot = torch.zeros_like(relaxed).scatter(-1, top, 1.0)
    log_prob = None
    if choice.noise == "gumbel":
        log_prob = _log_prob(scores / choice.noise_scale, visible, top)
    if visible is not None:
        empty = ~visible.any(dim=-1, keepdim=True).expand_as(top)
        one_hot, top = one_hot.masked_fill(empty, 0.0), top.masked_fill(empty, -1)
    return Chosen(relaxed, one_hot, top.squeeze(-1), log_prob)


def _noise(scores: Tensor, choice: Choice, *, sink: bool = False) -> Tensor | None:
    if choice.noise == "none":
        return None
    assert choice.where is not None
    return noise.sample(choice.noise, choice.where, sink=sink).to(scores.dtype)


def _log_prob(scores: Tensor, visible: Tensor | None, top: Tensor) -> Tensor:
    """log softmax(scores)[top] over the visible keys; 0 where there are none."""
    if visible is None:
        return scores.log_softmax(dim=-1).gather(-1, top).squeeze(-1)
    lowest = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    chosen = lowest.log_softmax(dim=-1).gather(-1, top)
    return chosen.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0).squeeze(-1)


def _without_sink(scores: Tensor, visible: Tensor | None, choice: Choice, sinks: Tensor) -> Chosen:
    """The choice with a sink as one more column, which is then dropped: it takes weight, but has no value."""
    seen = torch.ones_like(scores, dtype=torch.bool) if visible is None else visible.expand_as(scores)
    seen = torch.cat([seen, torch.ones_like(sinks, dtype=torch.bool)], dim=-1)
    all_scores = torch.cat([scores, sinks], dim=-1).masked_fill(~seen, 0.0)
    sampled = _noise(scores, choice)
    if sampled is not None:
        column = _noise(scores, choice, sink=True)
        assert column is not None
        sampled = torch.cat([sampled, column], dim=-1)
    chosen = _choose(all_scores, seen, choice, sampled)
    one_hot, indices = chosen.one_hot, chosen.indices
    if one_hot is not None and indices is not None:
        one_hot, indices = one_hot[..., :-1], indices.masked_fill(indices == scores.shape[-1], -1)
    return Chosen(chosen.relaxed[..., :-1], one_hot, indices, chosen.log_prob)


def attention(problem: AttentionProblem) -> AttentionInfo:
    """Attention as DESIGN's equations have it, differentiable by autograd in every float argument."""
    dtype, choice = compute_dtype(problem.query.dtype), problem.choice
    visible = problem.visible()
    query = problem.query.to(dtype)
    group = query.shape[1] // problem.key.shape[1]
    key = _hide(problem.key.to(dtype).repeat_interleave(group, dim=1), visible)
    value = _hide(problem.value.to(dtype).repeat_interleave(group, dim=1), visible)

    scores = query @ key.mT * problem.scale
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.bias is not None:
        bias = problem.bias.to(dtype)
        scores = scores + (bias if visible is None else torch.where(visible, bias, 0.0))
    sinks = problem.sinks
    if sinks is not None:
        sinks = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)

    chosen = choose(scores, visible, choice, sinks)
    factor = _dropout(problem, dtype)
    relaxed = chosen.relaxed if factor is None else chosen.relaxed * factor
    if chosen.one_hot is None or chosen.indices is None:
        output = weights = relaxed
        output = relaxed @ value
    else:
        one_hot = chosen.one_hot if factor is None else chosen.one_hot * factor
        weights = straight_through(one_hot, relaxed)
        output = straight_through(_gather(value, chosen.indices, one_hot), relaxed @ value.detach())
    out_dtype = problem.query.dtype
    return AttentionInfo(output.to(out_dtype), weights.to(out_dtype), chosen.indices, chosen.log_prob)


def _hide(x: Tensor, visible: Tensor | None) -> Tensor:
    """``x`` (B, H, Lk, D) with zeros for keys that no query sees: padding may hold NaN or inf, and 0 * NaN is NaN."""
    if visible is None:
        return x
    return x.masked_fill(~visible.any(dim=-2)[..., None], 0.0)


def _gather(value: Tensor, indices: Tensor, one_hot: Tensor) -> Tensor:
    """Rows ``indices`` of ``value``, times their weight; zeros for index -1 or weight 0. Reads no other row."""
    row = indices.clamp(min=0)[..., None]
    weight = one_hot.gather(-1, row)
    picked = torch.take_along_dim(value, row, dim=-2)
    return torch.where(weight > 0, picked * weight, 0.0)


def _dropout(problem: AttentionProblem, dtype: torch.dtype) -> Tensor | None:
    """What dropout multiplies the weights by: 0 or 1 / (1 - p)."""
    if problem.dropout_p == 0.0:
        return None
    assert problem.choice.where is not None
    return noise.dropout_factor(problem.dropout_p, problem.choice.where).to(dtype)
