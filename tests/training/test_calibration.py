"""Calibration error and selective accuracy against their definitions."""

from __future__ import annotations

import pytest
import torch

from harness.calibration import expected_calibration_error, selective_accuracy


def by_definition(confidence: list[float], correct: list[bool], bins: int) -> float:
    total = 0.0
    for b in range(bins):
        members = [i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)]
        if members:
            accuracy = sum(correct[i] for i in members) / len(members)
            mean = sum(confidence[i] for i in members) / len(members)
            total += len(members) / len(confidence) * abs(accuracy - mean)
    return total


@pytest.mark.parametrize("bins", [1, 4, 16])  # powers of two: the edges are exact
def test_calibration_error_is_its_definition(bins: int) -> None:
    confidence = torch.cat([torch.rand(200, dtype=torch.float64), torch.tensor([0.0, 0.25, 0.5, 1.0])])
    correct = torch.rand(204, dtype=torch.float64) < confidence**2
    got = expected_calibration_error(confidence, correct, bins)
    assert got == pytest.approx(by_definition(confidence.tolist(), correct.tolist(), bins))


def test_calibrated_confidence_has_a_small_error_and_overconfidence_a_large_one() -> None:
    """The error of 10^5 calibrated examples has mean < .006 and standard deviation < .002: false alarm < 1e-6."""
    confidence = 0.5 + 0.5 * torch.rand(100_000, dtype=torch.float64)
    correct = torch.rand(100_000, dtype=torch.float64) < confidence
    assert expected_calibration_error(confidence, correct) < 0.02
    assert expected_calibration_error(confidence.sqrt(), correct) > 0.05  # the control
    assert expected_calibration_error(torch.ones(4), torch.tensor([True, False, True, False])) == 0.5


def test_selective_accuracy_keeps_the_most_confident() -> None:
    confidence, correct = torch.tensor([0.9, 0.6, 0.8, 0.7]), torch.tensor([True, False, True, False])
    assert selective_accuracy(confidence, correct, 0.5) == 1.0
    assert selective_accuracy(confidence, correct, 0.51) == pytest.approx(2 / 3)
    assert selective_accuracy(confidence, correct, 1.0) == 0.5
    assert selective_accuracy(-confidence, correct, 0.5) == 0.0


def test_what_cannot_be_measured_is_refused() -> None:
    for confidence, correct in ((torch.ones(0), torch.ones(0)), (torch.ones(2), torch.ones(3))):
        with pytest.raises(ValueError, match="of one shape"):
            expected_calibration_error(confidence, correct)
    with pytest.raises(ValueError, match="coverage"):
        selective_accuracy(torch.ones(2), torch.ones(2), 0.0)
