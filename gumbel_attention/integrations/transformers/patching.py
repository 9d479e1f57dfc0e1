"""``patch_model``: Gumbel attention inside a model of the transformers library, for this instance only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...config import GumbelAttentionConfig
from ...selection import PatchedLayer, select
from ..inspection import computes_own_softmax, dispatches
from ..patched_state import CHILD
from .config_view import plain_config
from .patch import ModelPatch, PatchedModule
from .registry import MASK_CONVENTIONS, RegistryState

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


def patch_model(model: PreTrainedModel, config: GumbelAttentionConfig | Iterable[GumbelAttentionConfig]) -> ModelPatch:
    """Puts Gumbel attention into the attention layers of this model instance.

    Args:
        model: a transformers model whose attention dispatches through ``AttentionInterface``, with
            ``attn_implementation`` "eager" or "sdpa".
        config: the settings of the layers it selects; or several, for groups of layers that do not overlap.

    Returns:
        The patch: a handle for the temperature, the noise and the undo, and a context manager that undoes itself.

    Raises:
        TypeError: not a transformers model, or not a config.
        ValueError: a module that cannot be reached, a selection that matches nothing, overlapping selections, or a
            model that is patched already. Nothing has changed then.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}.")
    configs = list(config) if isinstance(config, Iterable) else [config]
    if not configs:
        raise ValueError("config must be a GumbelAttentionConfig or several, got none.")
    for entry in configs:
        if not isinstance(entry, GumbelAttentionConfig):
            raise TypeError(f"config must be a GumbelAttentionConfig or several, got {entry!r}.")
    found = _attention_layers(model)
    chosen: dict[str, GumbelAttentionConfig] = {}
    for entry in configs:
        for layer in select(found, entry.layers):
            if layer.name in chosen:
                raise ValueError(f"two configurations select the layer {layer.name!r}; their layers must not overlap.")
            chosen[layer.name] = entry
    _refuse_handwritten(model, everything=any(entry.layers is None for entry in configs))
    patched = [_with_state(model, layer, chosen[layer.name]) for layer in found if layer.name in chosen]
    return ModelPatch.put_in(model, patched)


def _attention_layers(model: PreTrainedModel) -> list[PatchedLayer]:
    """The modules of the model that dispatch, in its own order; raises where there are none or one cannot be taken."""
    names = [
        name
        for name, module in model.named_modules()
        if not isinstance(module, PreTrainedModel) and dispatches(type(module))
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no attention that dispatches through transformers' AttentionInterface; "
            f"patch_model cannot reach it. {_handwritten_hint(model)}"
        )
    return [PatchedLayer(name, type(model.get_submodule(name)).__name__, "registry") for name in names]


def _refuse_handwritten(model: PreTrainedModel, everything: bool) -> None:
    """Raises where all layers are asked for but some compute their own softmax."""
    hidden = _handwritten(model)
    if everything and hidden:
        raise ValueError(
            f"these attention modules of {type(model).__name__} compute their own softmax and cannot be reached: "
            f"{hidden}. Select the layers to patch with layers=..., or use another model."
        )


def _handwritten(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if computes_own_softmax(type(module))]


def _handwritten_hint(model: nn.Module) -> str:
    hidden = _handwritten(model)
    return f"These modules compute their own softmax: {hidden}." if hidden else "It has no softmax attention at all."


def _with_state(model: nn.Module, layer: PatchedLayer, config: GumbelAttentionConfig) -> PatchedModule:
    """A layer with the state it gets, not yet in force."""
    module: Any = model.get_submodule(layer.name)
    if hasattr(module, CHILD):
        raise ValueError(f"the layer {layer.name!r} is patched already: call remove() on its patch first.")
    implementation = plain_config(module.config)._attn_implementation or "eager"
    if implementation not in MASK_CONVENTIONS:
        raise ValueError(
            f"the layer {layer.name!r} uses attn_implementation={implementation!r}, whose masks Gumbel attention does "
            f"not read; expected one of {MASK_CONVENTIONS}: call model.set_attn_implementation('sdpa') first."
        )
    heads = next(
        (getattr(owner, attr) for owner in (module, module.config) for attr in HEAD_COUNTS if hasattr(owner, attr)),
        None,
    )
    if not isinstance(heads, int):
        raise ValueError(f"cannot tell how many heads the layer {layer.name!r} has; looked for {HEAD_COUNTS}.")
    return PatchedModule(layer, module, RegistryState(config, heads, module))
