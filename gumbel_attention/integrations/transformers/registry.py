"""The way in through transformers' registry: modules that ask their config which attention function to call.

Such a module gets a view of its config that carries our name; nothing else of the model changes. So the model builds
the masks it always built, unselected modules keep their implementation to the bit, and other models of the class never
notice.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import AttentionInterface
from transformers.utils.output_capturing import _active_collector

from ...attend import attend
from ..patched_state import PatchedState, state_of
from .config_view import config_view, plain_config
from .masks import CAUSAL_PADDING, NAME

MASK_CONVENTIONS = ("eager", "sdpa")
REFUSED = ("cache", "head_mask")


class RegistryState(PatchedState):
    """The state of a patched module that dispatches."""

    way = "registry"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.source_config: PretrainedConfig | None = None

    def enter(self, module: Any) -> None:
        """Gives the module a view of its config with our name, and itself as a child."""
        self.source_config = cast(PretrainedConfig, module.config)
        module.config = config_view(module, NAME)
        super().enter(module)

    def leave(self, module: Any) -> None:
        """Puts the module's config back."""
        super().leave(module)
        module.config = self.source_config
        self.source_config = None


def gumbel_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function registered in transformers' ``AttentionInterface``.

    Args:
        module: a patched attention module.
        query: (B, H, Lq, D).
        key: (B, Hk, Lk, D).
        value: (B, Hk, Lk, Dv).
        attention_mask: as the model's own implementation gets it: bool, additive, or ``None``.
        dropout: rate of the dropout on the weights.
        scaling: multiplies the scores.
        is_causal: overrides the module's own flag where the mask is ``None``.
        position_bias: added to the scores.
        softcap: bounds the scores by a tanh.
        s_aux: (H,) attention sinks.
        sinks: (H,) attention sinks, under another name.
        indices: (B, Lq, K), the only keys that a query may attend to.
        block_indices: the only blocks of keys, as the module's own indexer reads them.
        **kwargs: what else models pass; ignored, but for what would change the result, which is refused.

    Returns:
        Output (B, Lq, H, Dv), and the weights used (B, H, Lq, Lk) where the model was asked for its attentions.
    """
    state = state_of(module)
    if not isinstance(state, RegistryState):
        raise RuntimeError(
            f"attn_implementation={NAME!r} works through patch_model: load the model with 'sdpa' or 'eager' and call "
            "gumbel_attention.patch_model(model, config)."
        )
    refused = [name for name in REFUSED if kwargs.get(name) is not None]
    if refused:
        raise NotImplementedError(
            f"Gumbel attention cannot honour {refused} (a paged cache of continuous batching, or head masks) in "
            f"{type(module).__name__}; ignoring them would change the result. Remove the patch for this use."
        )
    state.note_run()
    attention_mask, causal = _mask_and_causal(module, query, key, attention_mask, is_causal)
    if indices is not None:
        attention_mask = _only_keys(indices, attention_mask, key.shape[-2])
    if block_indices is not None:
        attention_mask, causal = _only_blocks(module, block_indices, attention_mask, causal, query, key, kwargs), False
    info = attend(
        state,
        module.training,
        query,
        key,
        value,
        _with_bias(attention_mask, position_bias, key.shape[-2]),
        dropout,
        causal,
        scaling,
        softcap=softcap,
        sinks=sinks if s_aux is None else s_aux,
        need_weights=_weights_wanted(module, state.config.impl, kwargs),
    )
    return info.output.transpose(1, 2).contiguous(), info.weights


def _weights_wanted(module: Any, impl: str, kwargs: dict[str, Any]) -> bool:
    """Whether somebody may look at the weights: only a model that says what it records can say that nobody does.

    Where it does not say, an implementation that was asked for by name and holds no weights gives none.
    """
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        return True
    collected = _active_collector.get()
    if collected is None:
        return impl in ("auto", "reference")
    return any("attentions" in name for name in collected)


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


def _mask_and_causal(
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


def _only_keys(indices: Tensor, mask: Tensor | None, k_len: int) -> Tensor:
    """A mask that leaves of the keys only those that ``indices`` (B, Lq, K) names."""
    named = indices.new_zeros((*indices.shape[:2], k_len), dtype=torch.bool)
    return _with_keep(mask, named.scatter(-1, indices.long(), True)[:, None])


def _only_blocks(
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


def _with_bias(mask: Tensor | None, bias: Tensor | None, k_len: int) -> Tensor | None:
    """A mask and a learned bias (cut to the number of keys) as one additive mask."""
    if bias is None:
        return mask
    bias = bias[..., :k_len]
    if mask is None:
        return bias
    return bias + mask if mask.is_floating_point() else _with_keep(bias, mask)


AttentionInterface.register(NAME, gumbel_attention_forward)
