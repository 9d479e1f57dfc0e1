"""Whether a classifier's probabilities mean what they say."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    r"""Mean gap between accuracy and confidence (Guo et al. 2017): :math:`\sum_b |b|/n \; |acc_b - conf_b|`.

    Args:
        confidence: (n,) probability of the predicted class, in [0, 1].
        correct: (n,) bool.
        bins: intervals of equal width, each closed at its upper end.

    Raises:
        ValueError: there are no examples, or the shapes differ.
    """
    _check(confidence, correct)
    confidence, place = confidence.double(), (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, correct.double() - confidence)
    return float(gaps.abs().sum() / len(confidence))


def selective_accuracy(confidence: Tensor, correct: Tensor, coverage: float = 0.8) -> float:
    """Accuracy on the share ``coverage`` of the examples, rounded up, with the most confidence.

    Selective classification as in Geifman & El-Yaniv (2017).

    Among equal confidences the order is that of the examples.

    Args:
        confidence: (n,) probability of the predicted class.
        correct: (n,) bool.
        coverage: in (0, 1].

    Raises:
        ValueError: there are no examples, the shapes differ, or the coverage is out of range.
    """
    _check(confidence, correct)
    if not 0.0 < coverage <= 1.0:
        raise ValueError(f"coverage must be in (0, 1], got {coverage}.")
    kept = confidence.sort(descending=True, stable=True).indices[: math.ceil(coverage * len(confidence))]
    return float(correct[kept].double().mean())


def _check(confidence: Tensor, correct: Tensor) -> None:
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            f"expected confidence and correct of one shape (n,), n > 0, got {tuple(confidence.shape)} and "
            f"{tuple(correct.shape)}."
        )
