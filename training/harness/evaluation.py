"""The ways to evaluate one model: its noise off or on, the mean of several samples, its choice made hard or soft."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harness.errors import UsageError

NOISE_OFF = "noise_off"
NOISE_ON = "noise_on"
HARD = "hard"
SOFT = "soft"
_MEAN = re.compile(r"mean_([1-9][0-9]*)")


@dataclasses.dataclass(frozen=True)
class EvaluationMode:
    """One way to evaluate.

    Attributes:
        name: as settings and results call it.
        noise: whether there is noise.
        hard: whether the choice is hard; None is as the layers' settings say.
        samples: forward passes whose probabilities are averaged.
    """

    name: str
    noise: bool
    hard: bool | None = None
    samples: int = 1


_FIXED = {
    mode.name: mode
    for mode in (
        EvaluationMode(NOISE_OFF, noise=False),
        EvaluationMode(NOISE_ON, noise=True),
        EvaluationMode(HARD, noise=False, hard=True),
        EvaluationMode(SOFT, noise=False, hard=False),
    )
}


def evaluation_mode(name: str) -> EvaluationMode:
    """The mode of that name: ``noise_off``, ``noise_on``, ``mean_K``, or without noise ``hard`` and ``soft``.

    Raises:
        UsageError: there is no such mode.
    """
    if name in _FIXED:
        return _FIXED[name]
    mean = _MEAN.fullmatch(str(name))
    if mean is None:
        raise UsageError(
            f"eval_modes: expected {', '.join(_FIXED)} or mean_K, the mean of K noisy samples such as mean_4, got "
            f"{name!r}."
        )
    return EvaluationMode(name, noise=True, samples=int(mean[1]))


def evaluation_modes(names: Sequence[str] | None) -> list[EvaluationMode]:
    """The modes in this order; ``None`` is with noise off and on.

    Raises:
        UsageError: no such mode, one twice, or none at all.
    """
    if names is None:
        names = (NOISE_OFF, NOISE_ON)
    if not names or len(set(names)) != len(names):
        raise UsageError(f"eval_modes: expected at least one mode and none twice, got {list(names)}.")
    return [evaluation_mode(name) for name in names]


def numbers_of(metrics: Mapping[str, float | str]) -> dict[str, float]:
    """The metrics that are numbers; a text, such as which examples were right, stays in the evaluation series."""
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


class SampleMean(nn.Module):
    r"""A model whose logits are the logarithm of its mean probabilities over K forward passes.

    .. math:: \log \frac{1}{K} \sum_k \mathrm{softmax}(\mathrm{logits}_k)

    What else is in its output is that of the last pass.

    Args:
        model: returns an output with ``logits``, classes last; draws its noise anew in each pass.
        samples: K.
    """

    def __init__(self, model: nn.Module, samples: int) -> None:
        super().__init__()
        self.model = model
        self.samples = samples

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model with those logits."""
        total: torch.Tensor | None = None
        for _ in range(self.samples):
            output = self.model(*args, **kwargs)
            log_p = output.logits.float().log_softmax(-1)
            total = log_p if total is None else torch.logaddexp(total, log_p)
        assert total is not None
        return _with_logits(output, total - math.log(self.samples))


def sampling(model: nn.Module, mode: EvaluationMode) -> nn.Module:
    """The model, or the mean of its samples."""
    return model if mode.samples == 1 else SampleMean(model, mode.samples)


def _with_logits(output: Any, logits: torch.Tensor) -> Any:
    if isinstance(output, tuple):
        return output._replace(logits=logits)
    output.logits = logits
    return output
