"""Control of a model's own GumbelSetAttention and GumbelMultiheadAttention layers, which need no patch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch

import gumbel_attention as ga
from harness.errors import UsageError

ATTENTION_FILE = "attention.json"
_KINDS = (ga.GumbelSetAttention, ga.GumbelMultiheadAttention)


def has_library_layers(model: torch.nn.Module) -> bool:
    """Whether the model has attention layers of the library, which its task made as configured."""
    return any(isinstance(module, _KINDS) for module in model.modules())


class LibraryLayers:
    """The library's layers in a model, handled together like a patch.

    Args:
        model: has at least one of them.

    Raises:
        UsageError: it has none.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, _KINDS)}
        if not self.layers:
            raise UsageError(f"{type(model).__name__} has no layer of gumbel_attention: there is nothing to control.")

    @property
    def tau(self) -> list[torch.Tensor]:
        """The present temperature of each layer."""
        return [layer.gumbel.tau.detach() for layer in self.layers.values()]

    def set_tau(self, tau: float) -> None:
        """Sets the scheduled temperature of every layer."""
        for layer in self.layers.values():
            layer.set_tau(tau)

    def set_noise_scale(self, noise_scale: float) -> None:
        """Sets what multiplies the noise of every layer."""
        for layer in self.layers.values():
            layer.gumbel.set_noise_scale(noise_scale)

    @contextmanager
    def noise(self, on: bool | str) -> Iterator[None]:
        """Within this context the noise is on, off, or of a family by name; the switches before come back after it."""
        with self._switched("noise", on):
            yield

    @contextmanager
    def hard(self, on: bool | None) -> Iterator[None]:
        """Within this context the choice is hard or soft; the switches before come back after it."""
        with self._switched("hard", on):
            yield

    @contextmanager
    def _switched(self, switch: str, on: Any) -> Iterator[None]:
        """Within this context the layers' ``noise`` or ``hard`` switch is ``on``."""
        layers = list(self.layers.values())
        before = [getattr(layer.gumbel, f"{switch}_override") for layer in layers]
        try:
            for layer in layers:
                getattr(layer, switch)(on)
            yield
        finally:
            for layer, value in zip(layers, before, strict=True):
                getattr(layer, switch)(value)

    def learned_tau_parameters(self) -> list[torch.nn.Parameter]:
        """The learned temperatures."""
        return [layer.gumbel.log_tau for layer in self.layers.values() if layer.gumbel.log_tau is not None]

    def to_dict(self) -> dict[str, object]:
        """Settings and temperatures by the layers' names."""
        return {
            name: {"config": layer.gumbel.config.to_dict(), "tau": layer.gumbel.tau.tolist()}
            for name, layer in self.layers.items()
        }

    def save(self, folder: str | PathLike[str]) -> None:
        """Writes settings and temperatures into ``folder``; what is learned lies with the weights."""
        (Path(folder) / ATTENTION_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
