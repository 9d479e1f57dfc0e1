"""A whole training step of a classifier, patched against unpatched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import gumbel_attention as ga
from harness.contenders import ARMS
from harness.models import load_classifier

UNPATCHED = "unpatched"
PATCHED_ARMS = ("softmax", "gumbel-soft", "gumbel-st")
BERT_BASE_SHAPE = "bert-base-shape"
LABELS = ["negative", "positive"]


def training_steps(
    model_name: str,
    batch: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    impls: Mapping[str, str] | None = None,
    arms: Collection[str] = PATCHED_ARMS,
) -> dict[str, Callable[[], torch.Tensor]]:
    """One optimiser step of the same model for each way of attention, by name.

    Args:
        model_name: as ``model_name_or_path`` of finetune.py; or "bert-base-shape": random weights in BERT-base's
            shape, which need no file.
        batch: examples in the step.
        length: tokens in each; none is padding.
        device: where it runs.
        dtype: of the forward pass; the weights are float32, others by autocast.
        impls: the implementation of an arm; "auto" for those not named.
        arms: which patched models to make.
    """
    model: Any = (
        _fresh_bert() if model_name == BERT_BASE_SHAPE else load_classifier(model_name, LABELS, pad_token_id=0)
    )
    model = model.to(device).train()
    tokens = torch.randint(model.config.vocab_size, (batch, length), device=device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 2}
    steps = {UNPATCHED: _step(model, inputs, dtype)}
    for arm in arms:
        patched = copy.deepcopy(model)
        impl = (impls or {}).get(arm, "auto")
        ga.patch_model(patched, ga.GumbelAttentionConfig(impl=impl, **ARMS[arm]))
        steps[arm if impl == "auto" else f"{arm}, impl={impl!r}"] = _step(patched, inputs, dtype)
    return steps


def _fresh_bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(num_labels=len(LABELS)))


def _step(model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    device = inputs["input_ids"].device.type

    def step() -> torch.Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss: torch.Tensor = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
