"""Texts made of two, the beginning of one and the end of another: a teacher can answer them, there are no labels."""

from __future__ import annotations

import torch
from torch import Tensor


def splice(inputs: dict[str, Tensor], share: float, pad_token_id: int) -> tuple[dict[str, Tensor], Tensor]:
    """Puts spliced texts in the place of some.

    A spliced text has at least the first token of its own text and the last one of another text of the batch, which is
    drawn without replacement, and is at most as long as the batch. Both cuts are uniform over what this leaves. Texts
    of a single token stay, and so does a batch of one text.

    Args:
        inputs: ``input_ids`` (B, L), its ``attention_mask`` (B, L), with padding on either side, and what else is
            (B, L), such as ``token_type_ids``; others stay as they are.
        share: the probability of each text, in [0, 1].
        pad_token_id: what pads the new texts, at their end.

    Returns:
        The inputs, and which texts (B,) are new: their labels mean nothing.
    """
    ids = inputs["input_ids"]
    rows, width = ids.shape
    mask = inputs.get("attention_mask", torch.ones_like(ids)).cpu()
    first, lengths = mask.argmax(1), mask.sum(1)
    other = torch.randperm(rows)
    new = (torch.rand(rows) < share) & (lengths > 1) & (lengths[other] > 1) & (other != torch.arange(rows))
    kept = _between(torch.ones_like(lengths), lengths - 1)
    least = (lengths[other] - (width - kept)).clamp_min(1)
    cut = _between(least, lengths[other] - 1)
    place = torch.arange(width).expand(rows, width)
    own = place < kept[:, None]
    source = torch.where(own, torch.arange(rows)[:, None], other[:, None])
    position = torch.where(own, place + first[:, None], place - (kept - cut - first[other])[:, None])
    filled = place < (kept + lengths[other] - cut)[:, None]
    device = ids.device
    index = source.to(device), position.clamp(0, width - 1).to(device)
    chosen, is_new = filled.to(device), new.to(device)
    result = dict(inputs)
    for name, value in inputs.items():
        if value.shape == ids.shape:
            padding = pad_token_id if name == "input_ids" else 0
            result[name] = torch.where(is_new[:, None], torch.where(chosen, value[index], padding), value)
    if "attention_mask" not in inputs and bool(new.any()):
        result["attention_mask"] = torch.where(is_new[:, None], chosen, True).long()
    return result, is_new


def _between(low: Tensor, high: Tensor) -> Tensor:
    """Uniform whole numbers from low to high, both included; low where there are none."""
    count = (high - low + 1).clamp_min(1)
    return low + (torch.rand(low.shape) * count).long().clamp_max(count - 1)
