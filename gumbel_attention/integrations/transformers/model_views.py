"""The configs that a patched model shows of itself: with our name where it may build our masks, and what is saved."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..patched_state import state_of
from .config_view import config_view, plain_config
from .masks import NAME, mask_builders
from .registry import RegistryState
from .saved_settings import KEY, config_entry, is_entry


def refresh_views(model: nn.Module) -> None:
    """Gives every submodel the view of its config that the patches now in force ask for, or its own config back.

    Every submodel with a patched module tells of it when it is saved. Settings that a config carries from a file are
    taken out of it: from the first patch on, the model says what is true of it.
    """
    attention = {module for module in model.modules() if state_of(module) is not None}
    reached = {module for module in attention if isinstance(state_of(module), RegistryState)}
    submodels: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for submodel in submodels:
        submodel.config = plain_config(submodel.config)
        if is_entry(vars(submodel.config).get(KEY)):
            del vars(submodel.config)[KEY]
    builders = mask_builders(model, reached)
    for submodel in submodels:
        if not attention.isdisjoint(submodel.modules()):
            submodel.config = config_view(
                submodel, NAME if submodel in builders else None, config_entry, instead_of="sdpa"
            )
