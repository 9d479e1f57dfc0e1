"""Runs of finetune.py that are stopped and go on: how to start them, and what must be equal at the end."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetune
from harness.arguments import FinetuneArguments
from harness.loop import TrainingRecord
from harness.stopping import Stopped

HARD_TO_RESUME: dict[str, Any] = {
    "per_device_train_batch_size": 5,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "logging_steps": 4,
    "eval_steps": 2,
    "hard": True,
    "tau_schedule": "exponential",
    "tau_end": 0.5,
    "lr_scheduler_type": "cosine",
    "num_warmup_steps": 2,
    "save_model": True,
}
"""Noise, dropout, accumulation with a remainder at the end of an epoch, and a log that spans checkpoints."""
_MAY_DIFFER = {
    *("started", "train_seconds", "eval_seconds", "steps_per_second", "tokens_per_second"),
    *("peak_memory_bytes", "config"),
}


def start(settings: dict[str, Any], **changes: Any) -> TrainingRecord:
    """A run in this process, which overwrites nothing."""
    return finetune.run(FinetuneArguments(**{**settings, **changes}))


def words(settings: dict[str, Any]) -> list[str]:
    """The settings as a command line."""
    return [f"--{key}={value}" for key, value in settings.items()]


def outcome(folder: Path) -> dict[str, Any]:
    """What two runs of the same settings must agree on: all results but times, and the bytes of the weights."""
    results = json.loads((folder / "results.json").read_text())
    kept = {key: value for key, value in results.items() if key not in _MAY_DIFFER | {"resumed_at_steps"}}
    return kept | {"weights": (folder / "model" / "model.safetensors").read_bytes()}


def at_batch(number: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has ``action`` called before the forward pass of this training batch, counted from 1."""
    count, compute_loss = [0], finetune.Classification.compute_loss

    def counting(self: Any, model: Any, batch: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            action()
        return compute_loss(self, model, batch)

    monkeypatch.setattr(finetune.Classification, "compute_loss", counting)


def stop_at_batch(number: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    """A run that SIGTERM stops; returns what it says."""
    with monkeypatch.context() as patched:
        at_batch(number, lambda: signal.raise_signal(signal.SIGTERM), patched)
        with pytest.raises(Stopped) as stopped:
            start(settings, **changes)
    return str(stopped.value)
