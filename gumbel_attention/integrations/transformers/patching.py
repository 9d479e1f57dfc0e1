"""``patch_model``: Gumbel attention inside a model of the transformers library, for this instance only."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...config import GumbelAttentionConfig
from ...selection import PatchedLayer, select
from ..inspection import NO_SOFTMAX, architecture, way_in, why_not
from ..patched_state import CHILD, PatchedState
from ..rewriting import notes
from ..rewritten_softmax import SoftmaxState
from .checkpoints import Checkpoint
from .config_view import plain_config
from .mask_arguments import MASK_CONVENTIONS
from .patch import ModelPatch, PatchedModule
from .registry import RegistryState
from .restoring import carried, set_temperatures
from .saved_settings import SavedLayer, match_names

HEAD_COUNTS = ("num_attn_heads", "num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


class BothState(RegistryState, SoftmaxState):
    """The state of a module that dispatches, and in some of its settings or calls takes a softmax of its own."""

    way = "both"


STATES: dict[str, type[PatchedState]] = {state.way: state for state in (RegistryState, SoftmaxState, BothState)}
"""The state that a module gets, by the way in."""


def patch_model(
    model: PreTrainedModel,
    config: GumbelAttentionConfig | Iterable[GumbelAttentionConfig] | None = None,
) -> ModelPatch:
    """Puts Gumbel attention into the attention layers of this model instance.

    Args:
        model: a transformers model with softmax attention, ``attn_implementation`` "eager" or "sdpa". Modules that
            dispatch through ``AttentionInterface`` are reached there ("registry"); of modules that compute their
            softmax themselves the methods are rewritten to ask ours ("rewrite"). ``patch.layers`` says which.
        config: the settings of the layers it selects; or several, for groups of layers that do not overlap.
            ``None`` restores what the model's config carries since it was saved: the same layers with the same
            settings and temperatures, learned ones included.

    Returns:
        The patch: a handle for the temperature, the noise and the undo, and a context manager that undoes itself.

    Raises:
        TypeError: not a transformers model, or not a config.
        ValueError: a module that cannot be reached, a selection that matches nothing, overlapping selections, or a
            model that is patched already; or no saved settings, or none that fit. Nothing has changed then.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}.")
    if config is None:
        return restore_patch(model, *carried(model))
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
    _refuse_unreachable(model, configs)
    patched = [_with_state(model, layer, chosen[layer.name]) for layer in found if layer.name in chosen]
    return ModelPatch.put_in(model, patched)


def restore_patch(model: PreTrainedModel, saved: Sequence[SavedLayer], checkpoint: Checkpoint) -> ModelPatch:
    """Patches the layers that were saved, with the settings and temperatures they had.

    Raises:
        ValueError: a layer that the model does not have or that is patched already, or no learned temperature for one.
    """
    found = _attention_layers(model)
    names = match_names([layer.name for layer in saved], [layer.name for layer in found], "the saved patch")
    by_name = {names[layer.name]: layer for layer in saved}
    patched = [_with_state(model, layer, by_name[layer.name].config) for layer in found if layer.name in by_name]
    set_temperatures(patched, by_name, checkpoint)
    return ModelPatch.put_in(model, patched)


def _attention_layers(model: PreTrainedModel) -> list[PatchedLayer]:
    """The attention modules of the model that can be reached, in its own order; raises where there are none."""
    layers = []
    for name, module in model.named_modules():
        way = None if isinstance(module, PreTrainedModel) else way_in(type(module))
        if way is not None:
            layers.append(PatchedLayer(name, type(module).__name__, way, notes(type(module))))
    if not layers:
        reason = NO_SOFTMAX.get(architecture(type(model)) or "", "no module of it takes a softmax over keys")
        raise ValueError(
            f"{type(model).__name__} has no attention that patch_model can reach: {reason}.{_list(model)}"
        )
    return layers


def _refuse_unreachable(model: PreTrainedModel, configs: Sequence[GumbelAttentionConfig]) -> None:
    """Raises where attention is asked for that cannot be reached."""
    hidden = _unreachable(model)
    for entry in configs:
        patterns = ["*"] if entry.layers is None else [item for item in entry.layers if isinstance(item, str)]
        asked = [name for name in hidden if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if asked:
            raise ValueError(
                f"some of the attention of {type(model).__name__} cannot be reached.{_list(model)} Select the layers "
                f"to patch with layers=..., or use another model."
            )


def _unreachable(model: nn.Module) -> dict[str, str]:
    """Names of the attention modules that cannot be reached, each with the reason."""
    reasons = {
        name: why_not(type(module))
        for name, module in model.named_modules()
        if not isinstance(module, PreTrainedModel)
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _list(model: nn.Module) -> str:
    listed = [f"{name!r}: {reason}" for name, reason in _unreachable(model).items()]
    return f" Its modules {'; '.join(listed)}." if listed else ""


def _with_state(model: PreTrainedModel, layer: PatchedLayer, config: GumbelAttentionConfig) -> PatchedModule:
    """A layer with the state it gets, not yet in force."""
    module: Any = model.get_submodule(layer.name)
    if hasattr(module, CHILD):
        raise ValueError(f"the layer {layer.name!r} is patched already: call remove() on its patch first.")
    if layer.way != "rewrite":
        _check_masks(layer, module)
    return PatchedModule(layer, module, STATES[layer.way](config, _head_count(model, layer, module), module))


def _check_masks(layer: PatchedLayer, module: Any) -> None:
    implementation = plain_config(module.config)._attn_implementation or "eager"
    if implementation not in MASK_CONVENTIONS:
        raise ValueError(
            f"the layer {layer.name!r} uses attn_implementation={implementation!r}, whose masks Gumbel attention does "
            f"not read; expected one of {MASK_CONVENTIONS}: call model.set_attn_implementation('sdpa') first."
        )


def _head_count(model: PreTrainedModel, layer: PatchedLayer, module: nn.Module) -> int:
    """The query heads of a layer, as the module or else its config or the model's tells."""
    owners = (module, getattr(module, "config", None), model.config)
    found = (getattr(owner, name, None) for owner in owners for name in HEAD_COUNTS)
    heads = next((count for count in found if isinstance(count, int)), None)
    if heads is None:
        raise ValueError(f"cannot tell how many heads the layer {layer.name!r} has; looked for {HEAD_COUNTS}.")
    return heads
