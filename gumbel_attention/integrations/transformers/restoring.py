"""What a model carries of a patch that was saved, and the temperatures of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..patched_state import PatchedState
from .checkpoints import Checkpoint
from .config_view import plain_config
from .patch import PatchedModule, patched_modules
from .saved_settings import KEY, SavedLayer, is_entry, read_settings


def carried(model: nn.Module) -> tuple[list[SavedLayer], Checkpoint]:
    """The saved layers that a model's config carries, and where their learned temperatures lie.

    Raises:
        ValueError: it carries none, or the model is patched already.
    """
    if patched_modules(model):
        raise ValueError("the model is patched already; gumbel_attention.patch_of(model) gives the handle.")
    config: Any = plain_config(model.config)  # type: ignore[arg-type]  # any transformers model has one
    entry = vars(config).get(KEY)
    if not is_entry(entry):
        raise ValueError(
            f"the config of this {type(model).__name__} carries no Gumbel attention settings: give patch_model a "
            "GumbelAttentionConfig, or load the model with gumbel_attention.from_pretrained."
        )
    return read_settings(entry, "the model's config"), Checkpoint(config.name_or_path)


def set_temperatures(
    patched: Sequence[PatchedModule], saved: Mapping[str, SavedLayer], checkpoint: Checkpoint
) -> None:
    """Gives states that are not yet in force the temperatures and noise scales that were saved.

    Args:
        patched: the layers with their states.
        saved: what was saved of each, by its name in the model.
        checkpoint: where learned temperatures are read.

    Raises:
        ValueError: a learned temperature is missing or has another shape.
    """
    learning = [layer.name for layer, _, state in patched if state.log_tau is not None]
    learned = checkpoint.learned_tau([saved[name].name for name in learning]) if learning else {}
    for layer, _, state in patched:
        before = saved[layer.name]
        state.set_noise_scale(before.noise_scale)
        if state.log_tau is not None:
            _set_learned(state, learned[before.name], layer.name)
        elif before.tau is not None:
            state.set_tau(before.tau)


def _set_learned(state: PatchedState, value: Tensor, name: str) -> None:
    parameter: Any = state.log_tau
    if value.shape != parameter.shape:
        raise ValueError(
            f"the learned temperature saved for the layer {name!r} has shape {tuple(value.shape)}, expected "
            f"{tuple(parameter.shape)}: the weights belong to another model than the settings."
        )
    with torch.no_grad():
        parameter.copy_(value)
