"""A tracker that keeps what it is told, in the place of wandb, and what it is to be told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import accelerate.tracking
import torch
from accelerate.tracking import GeneralTracker

RATES = ("train/examples_per_second", "train/tokens_per_second")


class Recorder(GeneralTracker):
    """Keeps what it is told; ``runs`` are those that were made, in order."""

    name = "wandb"
    requires_logging_directory = False
    runs: ClassVar[list[Recorder]] = []

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options = project, options
        self.told: list[tuple[int, dict[str, Any]]] = []
        self.calls: list[str] = []
        self.config: dict[str, Any] | None = None
        self.runs.append(self)

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self.calls.append("start")
        torch.rand(3)  # a tracker that draws when it starts

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.told.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


@contextmanager
def recorded(installed: tuple[str, ...] = ("wandb",)) -> Iterator[list[Recorder]]:
    """In this context these packages seem installed, and ``wandb`` is the recorder."""
    Recorder.runs.clear()
    with (
        mock.patch.dict(accelerate.tracking.LOGGER_TYPE_TO_CLASS, {"wandb": Recorder}),
        mock.patch.object(
            accelerate.tracking, "_available_trackers", [accelerate.tracking.LoggerType(name) for name in installed]
        ),
    ):
        yield Recorder.runs


def series_of(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, values) that results.json holds, as trackers are to be told them, in the order of the run."""
    series = json.loads((folder / "results.json").read_text())["series"]
    told = []
    for entry in series["train"]:
        values = {f"train/{key}": entry[key] for key in ("epoch", "tau", "loss", "learning_rate")}
        values |= {f"attention/{key}": value for key, value in entry.get("attention", {}).items()}
        for layer, measures in entry.get("attention_layers", {}).items():
            values |= {f"attention/{layer}/{key}": value for key, value in measures.items()}
        told.append((entry["step"], 0, values))
    place = ("step", "epoch", "tau", "mode")
    for entry in series["evaluation"]:
        metrics = {f"eval/{entry['mode']}/{key}": entry[key] for key in entry if key not in place}
        told.append((entry["step"], 1, metrics))
    ordered = sorted(told, key=lambda each: each[:2])
    return [(step, {k: v for k, v in values.items() if v is not None}) for step, _, values in ordered]


def without_rates(told: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    return [(step, {key: value for key, value in values.items() if key not in RATES}) for step, values in told]
