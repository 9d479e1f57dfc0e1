"""What a model carries of a patch that was saved, and the temperatures of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..patched_state import PatchedState
from .checkpoints import Checkpoint, same_values
from .config_view import plain_config
from .patch import PatchedModule, patched_modules
from .saved_settings import KEY, SavedLayer, is_entry, read_settings


def carried(model: nn.Module) -> tuple[list[SavedLayer], Checkpoint]:
    """The saved layers that a model's config carries, and where their learned temperatures should lie.

    A config knows the folder or repository that it came from but no subfolder, revision or variant, so that other
    weights may be there: the layers say which learned temperatures are the right ones, if the config does.

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
        ValueError: a learned temperature is missing, has another shape, or is another than the saved layer says.
    """
    learning = [layer.name for layer, _, state in patched if state.log_tau is not None]
    learned = checkpoint.learned_tau([saved[name].name for name in learning]) if learning else {}
    for layer, _, state in patched:
        before = saved[layer.name]
        state.set_noise_scale(before.noise_scale)
        if state.log_tau is not None:
            _set_learned(state, learned[before.name], layer.name)
            if before.log_tau is not None:
                _check_learned(learned[before.name], before.log_tau, layer.name, checkpoint)
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


def _check_learned(value: Tensor, expected: Sequence[float], name: str, checkpoint: Checkpoint) -> None:
    own = torch.tensor(expected)
    if not same_values(value, own):
        raise ValueError(
            f"the model's config was saved with the learned temperatures {own.exp().tolist()} of the layer {name!r}, "
            f"and the weights at {checkpoint.path!r} hold {value.exp().tolist()}: the model comes from elsewhere, "
            "such as a subfolder or a revision, which its config does not say. Load it with "
            "gumbel_attention.from_pretrained(model_class, path, ...), or patch it with "
            "gumbel_attention.load_patch(model, path, ...), and give them its subfolder, revision or variant."
        )
