"""How many tokens a batch has, counted where the batch is, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch

_PADDING_LABEL = -100


def count_tokens(batch: Any) -> torch.Tensor | None:
    """The tokens of a batch that are no padding, a 0-d int64 tensor on its device; None if the batch does not tell.

    They are those of ``attention_mask``; without one those of ``input_ids`` that have a label, or all of them if the
    labels are not of tokens.
    """
    if "attention_mask" in batch:
        return (batch["attention_mask"] != 0).sum()
    if "input_ids" not in batch:
        return None
    tokens, labels = batch["input_ids"], batch.get("labels")
    if labels is not None and labels.shape == tokens.shape:
        return (labels != _PADDING_LABEL).sum()
    return torch.full((), tokens.numel(), device=tokens.device)
