"""The course of a hardening: which layers choose one key by now, as a function of the optimiser step alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

Order = Literal["none", "top_down", "bottom_up", "all"]


@dataclasses.dataclass(frozen=True)
class Hardening:
    """Layers that train soft and become hard one after another, and stay it.

    Args:
        order: ``"top_down"`` begins with the last layer, ``"bottom_up"`` with the first; ``"all"`` are hard at once.
        start: share of all steps after which the first layer is hard.
        end: share after which the last one is; those between follow at equal distances.
        layers: how many there are.
        steps: of the whole run.
    """

    order: Order
    start: float
    end: float
    layers: int
    steps: int

    def soft_layers(self, step: int) -> list[int]:
        """The places of the layers that are still soft after ``step`` optimiser steps, from the bottom."""
        hard = sum(step >= self._turning_step(place) for place in range(self.layers))
        return list(range(hard, self.layers) if self.order == "bottom_up" else range(self.layers - hard))

    def apply(self, patch: Any, step: int) -> None:
        """Makes the layers of a patch, hard by its settings, soft where they still are after ``step`` steps."""
        patch.hard(None)
        soft = self.soft_layers(step)
        if soft:
            patch.hard(False, layers=soft)

    def _turning_step(self, place: int) -> int:
        """After how many steps the layer is hard that is the ``place``-th to become it."""
        distance = 0.0 if self.order == "all" else (self.end - self.start) * place / max(1, self.layers - 1)
        return math.ceil(round((self.start + distance) * self.steps, 6))  # 0.1 + 0.2 is no step later than 0.3
