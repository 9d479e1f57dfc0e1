"""Predictions under noise: what a patched model says over several draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ..patched_state import PatchedState
from .patch import patched_modules
from .saving import patch_of

_PASS_STRIDE = 0x27BB2EE687B0B0FD
"""Between the seeds of two passes: odd and large, so that they stay clear of those of other layers and examples."""


class SampledPredictions(NamedTuple):
    """Class probabilities over K noisy passes.

    Attributes:
        mean: (..., C), the mean of the K probabilities.
        std: (..., C), their standard deviation about that mean (over K, not K - 1: 0 for one pass).
        votes: (..., C), the share of the passes in which a class was the most probable.
    """

    mean: Tensor
    std: Tensor
    votes: Tensor


def sample_predictions(model: nn.Module, inputs: Mapping[str, Any], k: int) -> SampledPredictions:
    """Class probabilities from ``k`` passes in eval mode, each with noise of its own in the attention.

    ``mean = 1/k sum_i softmax(logits_i)``; mean, spread and votes are summed up as the passes come, so that memory
    holds a few tensors of the logits' size, whatever ``k``. Noise is drawn from torch's default generator: after
    ``torch.manual_seed`` the result repeats. Within :meth:`ModelPatch.seeds` it is a function of each example's seed
    instead: the first pass has these seeds, each further one seeds derived from them. Layers without noise stay so;
    dropout is off. The mode of every module, the noise switches and the seeds are as before afterwards.

    Args:
        model: a patched model, wrapped or not, that returns ``logits``: (B, C) of classes, (B, L, V) of tokens.
        inputs: its keyword arguments.
        k: number of passes.

    Returns:
        :class:`SampledPredictions` in float32, or in float64 for logits in float64.

    Raises:
        TypeError, ValueError: ``k`` is not an integer >= 1; the model is not patched, has noise in no layer, or gives
            no logits, or no more than one, which have no probabilities.
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer >= 1, got {k!r} of type {type(k).__name__}.")
    if k < 1:
        raise ValueError(f"k must be an integer >= 1, got {k}.")
    patch_of(model)
    states = [state for _, _, state in patched_modules(model)]
    with torch.no_grad(), _eval_mode(model), _noise_on(states), _seeds_kept(states):
        mean = squares = votes = torch.zeros(())
        for count in range(1, k + 1):
            probabilities = _probabilities(model(**inputs))
            change = probabilities - mean
            mean = mean + change / count
            squares = squares + change * (probabilities - mean)
            votes = votes + one_hot(probabilities.argmax(-1), probabilities.shape[-1])
            for state in states:
                state.seeds = None if state.seeds is None else state.seeds + _PASS_STRIDE
    return SampledPredictions(mean, (squares / k).sqrt(), votes.to(mean.dtype) / k)


def _probabilities(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[-1] < 2:
        got = type(output).__name__ if not isinstance(logits, Tensor) else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(f"sample_predictions needs a model that returns logits of two classes or more, got {got}.")
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _noise_on(states: list[PatchedState]) -> Iterator[None]:
    """Turns on each layer's noise: the family it was switched to by name, else that of its settings."""
    before = [state.noise_override for state in states]
    families = [
        over if isinstance(over, str) and over != "none" else state.config.noise
        for over, state in zip(before, states, strict=True)
    ]
    if all(family == "none" for family in families):
        raise ValueError(
            "sample_predictions needs noise, but every patched layer has noise='none': patch with noise='gumbel', or "
            "choose a family with patch_of(model).noise('gumbel')."
        )
    for state, family in zip(states, families, strict=True):
        state.noise_override = family
    try:
        yield
    finally:
        for state, override in zip(states, before, strict=True):
            state.noise_override = override


@contextmanager
def _seeds_kept(states: list[PatchedState]) -> Iterator[None]:
    before = [state.seeds for state in states]
    try:
        yield
    finally:
        for state, seeds in zip(states, before, strict=True):
            state.seeds = seeds
