"""A whole training step of a pretrained classifier, patched against unpatched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

import gumbel_attention as ga
from harness.models import load_classifier

UNPATCHED = "unpatched"
PATCHES: Mapping[str, dict[str, Any]] = {
    "softmax": {"noise": "none"},
    "gumbel-soft": {"noise": "gumbel"},
    "gumbel-st": {"noise": "gumbel", "hard": True},
}


def training_steps(
    model_name: str, batch: int, length: int, device: torch.device
) -> dict[str, Callable[[], torch.Tensor]]:
    """One optimiser step of the same model for each way of attention, by name.

    Args:
        model_name: as ``model_name_or_path`` of finetune.py.
        batch: examples in the step.
        length: tokens in each; none is padding.
        device: where it runs.
    """
    model = load_classifier(model_name, ["negative", "positive"], pad_token_id=0).to(device).train()
    tokens = torch.randint(model.config.vocab_size, (batch, length), device=device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 2}
    steps = {UNPATCHED: _step(model, inputs)}
    for name, settings in PATCHES.items():
        patched = copy.deepcopy(model)
        ga.patch_model(patched, ga.GumbelAttentionConfig(**settings))
        steps[name] = _step(patched, inputs)
    return steps


def _step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> torch.Tensor:
        loss: torch.Tensor = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
