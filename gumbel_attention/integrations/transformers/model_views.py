"""The configs that a patched model shows of itself: with our name where it may build our masks."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..patched_state import CHILD, PatchedState
from .config_view import config_view, plain_config
from .masks import NAME, mask_builders
from .registry import RegistryState


def refresh_views(model: nn.Module) -> None:
    """Gives every submodel the view of its config that the patches now in force ask for, or its own config back."""
    attention = [module for module in model.modules() if isinstance(getattr(module, CHILD, None), PatchedState)]
    reached = {module for module in attention if isinstance(getattr(module, CHILD), RegistryState)}
    submodels: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for submodel in submodels:
        submodel.config = plain_config(submodel.config)
    builders = mask_builders(model, reached)
    for submodel in submodels:
        if submodel in builders:
            submodel.config = config_view(submodel, NAME)
