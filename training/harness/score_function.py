"""The loss of a task whose attention chooses keys and whose gradient comes from their log-probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gumbel_attention as ga


def sampled_loss(
    losses_of: Callable[[torch.nn.Module, Any], Tensor], model: torch.nn.Module, batch: Any, baseline: str
) -> Tensor:
    """The score function's loss of a batch.

    Args:
        losses_of: (model, batch) -> the loss of each example, (B,).
        model: patched, with ``estimator="score_function"``.
        batch: what ``losses_of`` takes.
        baseline: ``"none"``, or ``"soft"``: the losses under soft attention, for one more forward pass.
    """
    with ga.collect_log_probs(model) as chosen:
        losses = losses_of(model, batch)
    if baseline == "none":
        return ga.score_function_loss(losses, chosen.log_prob())
    with torch.no_grad(), ga.soft_attention(model):
        expected = losses_of(model, batch)
    return ga.score_function_loss(losses, chosen.log_prob(), expected)
