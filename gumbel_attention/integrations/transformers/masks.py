"""Masks as a patched model builds them: a row of padding where the model's own function would fill Lq x Lk entries."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from ..inspection import source_of, way_in, why_not

NAME = "gumbel_attention"
"""Ours in transformers' registries of attention functions and of mask functions."""
CAUSAL_PADDING = torch.float8_e5m2
"""The dtype of a padding mask (B, 1, 1, Lk) that stands for a causal one. A bool mask of this shape would be taken for
the whole truth; in this dtype a model that calculates with its masks raises an error and shows no query the future."""
_BUILDS_MASKS = re.compile(r"\bcreate_(causal|bidirectional)_mask\(")
_LOOKS_AT_NAME = re.compile(r"_attn_implementation\s*(==|!=|in\b|not\b)")
_CALCULATES = re.compile(
    r"[+&*~]\s*attention_mask\b(?!\[)|\battention_mask\s*([+&]|==\s*0|\.masked_fill|\.dtype\s*==)"
)


def compact_mask(
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The function registered in transformers' ``AttentionMaskInterface``: its sdpa masks, small where they can be.

    Args:
        q_length: number of queries.
        kv_length: number of keys.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: says of a query and a key whether they meet.
        attention_mask: (B, kv_length), nonzero at real tokens.
        **kwargs: what else transformers passes.

    Returns:
        (B, 1, 1, kv_length): bool for attention to both sides; of dtype :data:`CAUSAL_PADDING` for causal attention
        over the whole sequence. Or what ``sdpa_mask`` returns: ``None`` where nothing is padded, and (B, 1, q_length,
        kv_length) for windows, packed sequences and caches.
    """
    row = _padding(kv_length, q_offset, kv_offset, attention_mask)
    if row is not None and not _may_skip(row, kwargs):
        if mask_function is bidirectional_mask_function:
            return row
        if mask_function is causal_mask_function and q_length == kv_length > 1:
            return row.to(CAUSAL_PADDING)
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def _padding(kv_length: int, q_offset: object, kv_offset: object, attention_mask: Tensor | None) -> Tensor | None:
    """The padding of a whole sequence, bool (B, 1, 1, kv_length); ``None`` where it is not one, or there is none."""
    whole = isinstance(q_offset, int) and isinstance(kv_offset, int) and q_offset == kv_offset == 0
    if not whole or attention_mask is None or attention_mask.ndim != 2 or attention_mask.shape[-1] != kv_length:
        return None
    return attention_mask[:, None, None, :].bool()


def _may_skip(row: Tensor, settings: dict[str, Any]) -> bool:
    """Whether ``sdpa_mask`` would look at the values and find that no mask is needed."""
    allowed = settings.get("allow_is_causal_skip", True) or settings.get("allow_is_bidirectional_skip", False)
    return allowed and not torch.compiler.is_compiling() and bool(row.all())


def mask_builders(model: nn.Module, reached: Collection[nn.Module]) -> list[nn.Module]:
    """The submodels that build sdpa masks for modules in ``reached`` only: these may build them in our way."""
    return [
        builder
        for builder in model.modules()
        if isinstance(builder, PreTrainedModel)
        and builder.config._attn_implementation == "sdpa"
        and _builds_masks(type(builder))
        and not any(_calculates(cls) for cls in {type(module) for module in builder.modules()})
        and all(module in reached for module in builder.modules() if _attends(module))
    ]


def _attends(module: nn.Module) -> bool:
    if isinstance(module, PreTrainedModel):
        return False
    return way_in(type(module)) is not None or why_not(type(module)) is not None


def _calculates(cls: type[nn.Module]) -> bool:
    """Whether modules of this class calculate with masks; of those reached by both ways it is what we replace."""
    return way_in(cls) != "both" and bool(_CALCULATES.search(source_of(cls)))


def _builds_masks(cls: type[nn.Module]) -> bool:
    """Whether a model of this class calls transformers' mask functions, and asks for no implementation by name."""
    source = source_of(cls)
    return bool(_BUILDS_MASKS.search(source)) and not _LOOKS_AT_NAME.search(source)


AttentionMaskInterface.register(NAME, compact_mask)
