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
from .config_view import config_view
from .mask_arguments import mask_and_causal, only_blocks, only_keys, with_bias, with_sink_key
from .masks import NAME
from .positions import Call, follow_calls, offsets, unfollow_calls

REFUSED = ("cache", "head_mask")


class RegistryState(PatchedState):
    """The state of a patched module that dispatches."""

    way = "registry"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.source_config: PretrainedConfig | None = None
        self.weights_given = False
        self.call: Call | None = None

    def enter(self, module: Any) -> None:
        """Gives the module a view of its config with our name, and itself as a child."""
        self.source_config = cast(PretrainedConfig, module.config)
        module.config = config_view(module, NAME)
        follow_calls(module)
        super().enter(module)

    def leave(self, module: Any) -> None:
        """Puts the module's config back."""
        super().leave(module)
        unfollow_calls(module)
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
        sinks: the same under another name; or (B, H, Lq, 1), for each query its own, which then takes part as a
            key at position Lk without value.
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
    attention_mask, causal = mask_and_causal(module, query, key, attention_mask, is_causal)
    sinks = sinks if s_aux is None else s_aux
    sink_key = sinks is not None and sinks.ndim == 4
    q_offset: int | Tensor = 0
    k_offset: int | Tensor = 0
    call = state.call
    if call is not None and call.cache is not None:
        state.call = None  # which would keep the cache
    if state.draws_by_seeds(module.training, dropout):
        q_offset, k_offset = offsets(module, call, query, key, attention_mask, sink_key)
    if indices is not None:
        attention_mask = only_keys(indices, attention_mask, key.shape[-2])
    if block_indices is not None:
        attention_mask, causal = only_blocks(module, block_indices, attention_mask, causal, query, key, kwargs), False
    attention_mask = with_bias(attention_mask, position_bias, key.shape[-2])
    k_len = key.shape[-2]
    if sinks is not None and sink_key:
        key, value, attention_mask = with_sink_key(sinks, key, value, attention_mask, causal)
        sinks, causal = None, False
    info = attend(
        state,
        module.training,
        query,
        key,
        value,
        attention_mask,
        dropout,
        causal,
        scaling,
        softcap=softcap,
        sinks=sinks,
        need_weights=_weights_given(module, state, kwargs),
        q_offset=q_offset,
        k_offset=k_offset,
    )
    weights = info.weights
    if weights is not None and key.shape[-2] != k_len:
        weights = weights[..., :k_len]  # only then: a view would not be what the output is computed from
    return info.output.transpose(1, 2).contiguous(), weights


def _weights_given(module: nn.Module, state: RegistryState, kwargs: dict[str, Any]) -> bool:
    """Whether the call gives weights.

    Checkpointing repeats it in the backward pass, where the model does not say what it records: there it does what it
    did in the forward pass, or other tensors would be saved.
    """
    if torch.compiler.is_compiling():
        return _weights_wanted(module, state.config.impl, kwargs)
    if torch._C._current_graph_task_id() != -1:  # in a backward pass
        return state.weights_given
    state.weights_given = _weights_wanted(module, state.config.impl, kwargs)
    return state.weights_given


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


AttentionInterface.register(NAME, gumbel_attention_forward)
