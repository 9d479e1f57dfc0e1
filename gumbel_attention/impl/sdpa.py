"""torch's own scaled_dot_product_attention, for what it can do: softmax with a temperature and no noise."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import AttentionProblem, compute_dtype


def unsupported(problem: AttentionProblem) -> str | None:
    """Why this implementation cannot solve the problem; ``None`` if it can."""
    if problem.choice.hard or problem.choice.noise != "none":
        return "it has neither noise nor a hard choice"
    if problem.choice.top_k is not None:
        return "it has no relaxed subsets"
    if problem.softcap is not None or problem.sinks is not None:
        return "it has neither softcap nor sinks"
    if problem.dropout_p > 0.0 and problem.seed_given:
        return "its dropout cannot repeat a given seed"
    return None


def attention(problem: AttentionProblem) -> Tensor:
    """softmax(scores / tau) V, (B, H, Lq, Dv); dropout draws from torch's default generator."""
    query, key, value = problem.query, *problem.hidden_keys_and_values()
    scale, tau = problem.scale, problem.choice.tau
    if isinstance(tau, Tensor):
        query = (query.to(compute_dtype(query.dtype)) / tau).to(query.dtype)
    else:
        scale = scale / tau
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        _mask(problem),
        problem.dropout_p,
        is_causal=_is_plain_causal(problem),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _is_plain_causal(problem: AttentionProblem) -> bool:
    """Whether torch's causal flag says it all: it starts at the first query and key, and allows no mask beside it."""
    q, k = problem.q_offset, problem.k_offset
    aligned = isinstance(q, int) and isinstance(k, int) and q == k
    return problem.is_causal and aligned and problem.keep is None


def _mask(problem: AttentionProblem) -> Tensor | None:
    visible = None if _is_plain_causal(problem) else problem.visible()
    if problem.bias is None:
        return visible
    if visible is None:
        return (problem.bias / problem.choice.tau).to(problem.query.dtype)
    finite = problem.bias.masked_fill(~visible, 0.0)  # else tau's gradient has 0 * inf, which is NaN
    return (finite / problem.choice.tau).masked_fill(~visible, -torch.inf).to(problem.query.dtype)
