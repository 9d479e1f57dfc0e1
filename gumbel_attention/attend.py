"""Attention as a layer's state asks for it: the call that every module and integration makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import attention_problem, draws
from .functional import AttentionInfo, gumbel_attention, gumbel_attention_with_info
from .noise import draw_seed
from .state import AttentionState


def attend(
    state: AttentionState,
    training: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    need_weights: bool = True,
    q_offset: int | Tensor | None = None,
    k_offset: int | Tensor = 0,
) -> AttentionInfo:
    """:func:`gumbel_attention_with_info` with the settings, temperature and noise switch of ``state``.

    Heads that ``state.config.heads`` leaves out get their plain softmax (tau 1, no noise, soft), to the bit. Where
    the others choose hard, such a head has index -1 and log-probability 0: it made no choice.

    Args:
        state: of the layer that attends.
        training: the layer's mode.
        query: (B, H, q_len, D).
        key: (B, Hk, k_len, D); Hk divides H.
        value: (B, Hk, k_len, Dv).
        attn_mask: as in :func:`gumbel_attention_with_info`, like all that follow.
        dropout_p: of the weights used.
        is_causal: a query sees no later key; goes together with a mask.
        scale: multiplies the scores; ``None`` is 1 / sqrt(D).
        softcap: bounds the scores.
        sinks: (H,) scores of a column without value.
        need_weights: give the weights, which only the reference holds, and with them indices and log-probabilities.
        q_offset: position of the first query; ``None`` is 0, or unknown where there are fewer queries than keys.
        k_offset: position of the first key.

    Returns:
        :class:`AttentionInfo`; without ``need_weights`` it has no weights, and indices and log-probabilities only
        where the state collects the latter.

    Raises:
        NotImplementedError: the state has seeds, whose noise belongs to positions, and the queries' are unknown.
        ValueError: some heads are left out, and the query has not as many heads as ``state``.
        TypeError, ValueError: as :func:`gumbel_attention_with_info`.
    """

    enable_gqa = query.shape[-3] != key.shape[-3]
    if q_offset is None and query.shape[-2] < key.shape[-2] and state.draws_by_seeds(training, dropout_p):
        raise NotImplementedError(
            f"what is drawn by seeds belongs to positions, and this layer does not say where its {query.shape[-2]} "
            f"queries stand among {key.shape[-2]} keys: call the model on whole sequences with use_cache=False, or "
            "leave the layer out of the patch."
        )
    q_offset = 0 if q_offset is None else q_offset
    further: Any = {"softcap": softcap, "sinks": sinks, "q_offset": q_offset, "k_offset": k_offset}

    def with_settings(need_choice: bool = False, **settings: Any) -> AttentionInfo:
        inputs = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        settings |= further
        if need_weights or need_choice:
            return gumbel_attention_with_info(*inputs, need_weights=need_weights, **settings)
        return AttentionInfo(gumbel_attention(*inputs, **settings), None, None, None)

    settings = state.arguments(training)
    if state.observers:
        if "seed" not in settings and draws(settings["noise"], settings.get("noise_scale", 1.0)):
            settings["seed"] = draw_seed(device=query.device)  # what the call would draw, known to the observers too
        seen = attention_problem(
            query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, **further, **settings
        )
        for observer in state.observers:
            observer(seen)
    chosen = with_settings(state.collects(settings), **settings)
    if state.config.heads is not None:
        plain = with_settings(noise="none", impl=state.config.impl, seed=state.seeds)
        chosen = _with_plain_heads(state, query, chosen, plain)
    state.hand_over(chosen.log_prob)
    return chosen


def _with_plain_heads(
    state: AttentionState, query: Tensor, chosen: AttentionInfo, plain: AttentionInfo
) -> AttentionInfo:
    """``plain`` in the heads that the settings leave out."""
    if query.shape[-3] != state.num_heads:
        raise ValueError(
            f"heads={list(state.config.heads or ())} selects from {state.num_heads} heads, got a query of shape "
            f"{tuple(query.shape)} with {query.shape[-3]}."
        )
    return _per_head(_selected(state, query.device), chosen, plain)


def _selected(state: AttentionState, device: torch.device) -> Tensor:
    """Which heads the settings select: bool (H, 1)."""
    chosen = {head % state.num_heads for head in state.config.heads or ()}
    return torch.tensor([[head in chosen] for head in range(state.num_heads)], device=device)


def _where_selected(selected: Tensor, indices: Tensor) -> Tensor:
    """Indices (B, H, Lq) or (B, H, Lq, k) of the selected heads, -1 for the others."""
    return indices.where(selected if indices.ndim == 3 else selected[..., None], -1)


def _per_head(selected: Tensor, chosen: AttentionInfo, plain: AttentionInfo) -> AttentionInfo:
    """``chosen`` for the selected heads, ``plain`` for the others, which choose nothing."""
    weights = None
    if chosen.weights is not None and plain.weights is not None:
        weights = torch.where(selected[..., None], chosen.weights, plain.weights)
    return AttentionInfo(
        torch.where(selected[..., None], chosen.output, plain.output),
        weights,
        None if chosen.indices is None else _where_selected(selected, chosen.indices),
        None if chosen.log_prob is None else chosen.log_prob.where(selected, 0.0),
    )
