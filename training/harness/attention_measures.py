"""What the attention does while it trains: the library's diagnostics of single batches, over all processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from gumbel_attention.diagnostics import MEASURES, CollectedDiagnostics, collect_diagnostics


class AttentionMeasures:
    """Measures the batches it is told to, and keeps the last on the device until it is read.

    Args:
        accelerator: of the run.
        model: prepared, with attention of the library unless ``wanted`` is ``"none"``.
        wanted: ``"mean"`` over the layers, ``"layers"`` for each of them too, or ``"none"``.
    """

    def __init__(self, accelerator: Accelerator, model: Any, wanted: str) -> None:
        self._accelerator = accelerator
        self._model = accelerator.unwrap_model(model, keep_torch_compile=False)
        self._wanted = wanted
        self._layers: list[str] = []
        self._totals: torch.Tensor | None = None

    @contextmanager
    def measuring(self, due: bool, share: float) -> Iterator[None]:
        """Measures the forward pass in this context if ``due``; a process whose ``share`` is 0 does not count."""
        if not due or self._wanted == "none":
            yield
            return
        with collect_diagnostics(self._model) as found:
            yield
        self._layers, self._totals = found.layers, _totals(found, self._accelerator.device) * (share > 0)

    def read(self) -> dict[str, Any]:
        """What an entry of the training series says of the batch measured last; all processes call this together.

        ``attention`` are the means over the layers by measure, ``attention_layers`` the measures by layer; a measure
        is None where no query counted.
        """
        if self._totals is None:
            return {}
        totals = self._accelerator.reduce(self._totals, reduction="sum")
        self._totals = None
        table = totals[..., 0] / totals[..., 1]  # layer by measure; 0 / 0 where none counted
        entry: dict[str, Any] = {"attention": _named(table.nanmean(0).tolist())}
        if self._wanted == "layers":
            entry["attention_layers"] = dict(zip(self._layers, map(_named, table.tolist()), strict=True))
        return entry


def _totals(found: CollectedDiagnostics, device: torch.device) -> torch.Tensor:
    """(layers, measures, 2): sum and count; zero for layers that did not run, lest processes differ in shape."""
    totals = torch.zeros(len(found.layers), len(MEASURES), 2, device=device)
    means, counted = found.per_layer(), found.counted()
    for row, layer in enumerate(found.layers):
        for column, name in enumerate(MEASURES):
            if name in means.get(layer, {}):
                count = counted[layer]
                total = torch.where(count > 0, means[layer][name], 0.0) * count
                totals[row, column] = torch.stack((total, count)).to(totals)
    return totals


def _named(values: list[float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in zip(MEASURES, values, strict=True)}
