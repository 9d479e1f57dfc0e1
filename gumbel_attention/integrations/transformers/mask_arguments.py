"""The masks, biases, key choices and sinks that models pass, as attention takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config_view import plain_config
from .masks import CAUSAL_PADDING

MASK_CONVENTIONS = ("eager", "sdpa")
"""The implementations of transformers whose masks are read."""


def _none_means_causal(module: nn.Module, convention: str, is_causal: bool | None) -> bool:
    """Whether a missing mask stands for a causal one: so with the model's sdpa masks, never with its eager ones."""
    flag = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return convention == "sdpa" and bool(flag)


def _mask_convention(module: Any) -> str:
    """The implementation the model builds its masks for. Others' are refused: flash's has the shape (B, Lk)."""
    convention = plain_config(module.config)._attn_implementation or "eager"
    if convention not in MASK_CONVENTIONS:
        raise RuntimeError(
            f"a patched model builds its masks for {convention!r}, expected one of {MASK_CONVENTIONS}: call "
            "model.set_attn_implementation('sdpa')."
        )
    return convention


def _whole_padding(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The padding that a causal padding mask says, as bool; it is made for whole sequences only."""
    if mask.shape[-2] != 1 or mask.shape[-1] != key.shape[-2] or query.shape[-2] != key.shape[-2]:
        raise RuntimeError(
            f"a causal padding mask must have the shape (B, 1, 1, {key.shape[-2]}) and belong to as many queries, got "
            f"{tuple(mask.shape)} and {query.shape[-2]} queries: the model changed its mask. Build the model with "
            "attn_implementation='eager', whose masks say every entry."
        )
    return mask.to(torch.bool)


def mask_and_causal(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> tuple[Tensor | None, bool]:
    """The mask as attention takes it, no longer than the keys, and whether a query sees no later key besides."""
    convention = _mask_convention(module)
    if mask is None:
        return None, query.shape[2] > 1 and _none_means_causal(module, convention, is_causal)
    mask = mask[..., : key.shape[-2]]
    if mask.dtype == CAUSAL_PADDING:
        return _whole_padding(mask, query, key), True
    return mask, False


def only_keys(indices: Tensor, mask: Tensor | None, k_len: int) -> Tensor:
    """A mask that leaves of the keys only those that ``indices`` (B, Lq, K) names."""
    named = indices.new_zeros((*indices.shape[:2], k_len), dtype=torch.bool)
    return _with_keep(mask, named.scatter(-1, indices.long(), True)[:, None])


def only_blocks(
    module: Any,
    block_indices: Tensor,
    mask: Tensor | None,
    causal: bool,
    query: Tensor,
    key: Tensor,
    kwargs: dict[str, Any],
) -> Tensor:
    """The additive mask that the module's own indexer builds of the blocks it chose."""
    build = getattr(getattr(module, "indexer", None), "build_block_mask", None)
    if build is None:
        raise NotImplementedError(
            f"{type(module).__name__} passes block_indices and has no indexer that builds a mask of them; ignoring "
            "them would change the result. Remove the patch for this layer."
        )
    q_len, k_len = query.shape[-2], key.shape[-2]
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(k_len - q_len, k_len, device=query.device)
    position_ids = position_ids.expand(query.shape[0], -1)
    if causal:
        mask = _with_keep(mask, position_ids[:, None, :, None] >= torch.arange(k_len, device=query.device))
    built: Tensor = build(block_indices, mask, k_len, query.dtype, query.device, position_ids)
    return built


def _with_keep(mask: Tensor | None, keep: Tensor) -> Tensor:
    """A mask of which only ``keep`` takes part."""
    if mask is None:
        return keep
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, float("-inf"))


def with_bias(mask: Tensor | None, bias: Tensor | None, k_len: int) -> Tensor | None:
    """A mask and a learned bias (cut to the number of keys) as one additive mask."""
    if bias is None:
        return mask
    bias = bias[..., :k_len]
    if mask is None:
        return bias
    return bias + mask if mask.is_floating_point() else _with_keep(bias, mask)


def with_sink_key(
    sinks: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and additive mask with one more key, whose scores are ``sinks`` and whose value is 0.

    Args:
        sinks: (B, H, Lq, 1), one for each query.
        key: (B, Hk, Lk, D).
        value: (B, Hk, Lk, Dv).
        mask: bool or additive, or ``None``.
        causal: a query sees no later key besides.
    """
    k_len = key.shape[-2]
    scores = sinks.new_zeros((*sinks.shape[:3], k_len))
    if causal:
        positions = torch.arange(k_len, device=key.device)
        scores = scores.masked_fill(positions > positions[: sinks.shape[2], None], float("-inf"))
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else _with_keep(scores, mask)
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
    return key, value, torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
