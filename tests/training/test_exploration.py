"""Recovery from wrong early choices, example by example."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from studies import row_of

from harness.right_wrong import from_text, to_text
from study.exploration import exploration_of, mean_course
from study.findings import Arm
from study.rows import Row


def row(*right: str, seed: int = 0, mode: str = "noise_off") -> Row:
    """Evaluated after 10, 20, ... steps; each text has a 1 for a right choice."""
    content = row_of("arm", seed)
    content["series"]["evaluation"] = [
        {"step": 10 * number, "mode": mode, "right_choices": to_text(torch.tensor([bit == "1" for bit in bits]))}
        for number, bits in enumerate(right, start=1)
    ]
    return Row(content["id"], "arm", seed, content)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_the_text_gives_the_truth_values_back(count: int) -> None:
    right = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    assert np.array_equal(from_text(to_text(right)), right.numpy())
    assert len(to_text(right)) <= len(str(count)) + 1 + 2 * math.ceil(count / 8)


@pytest.mark.parametrize("text", ["", "4", "x:90", "9:90", "4:9090", "4:zz"])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"COUNT:HEX|hexadecimal"):
        from_text(text)


def test_recovered_and_lost_against_hand_counts() -> None:
    found = exploration_of(row("10010000", "11010110", "01110000"), "noise_off")
    assert found is not None
    assert found.steps == (10, 20, 30)
    assert found.recovered == pytest.approx((0.0, 3 / 6, 2 / 6))  # of the six that were wrong at first
    assert found.lost == pytest.approx((0.0, 0.0, 1 / 2))


def test_without_two_evaluations_that_know_the_choices_there_is_nothing() -> None:
    assert exploration_of(row("1001"), "noise_off") is None
    assert exploration_of(row("1001", "1111"), "hard") is None
    plain = Row("id", "arm", 0, row_of("arm", 0))
    assert exploration_of(plain, "noise_off") is None
    assert mean_course(Arm("arm", (plain,)), "noise_off", "recovered") is None


def test_the_course_is_the_mean_over_the_seeds() -> None:
    arm = Arm("arm", (row("0000", "1000"), row("0001", "1111", seed=1)))
    assert mean_course(arm, "noise_off", "recovered") == ([10.0, 20.0], [0.0, pytest.approx((1 / 4 + 1) / 2)])
    assert mean_course(arm, "noise_off", "lost") is None, "a run without right choices at first has none to lose"
    other: Any = Arm("arm", (row("0000", "1000"), row("0001", "1111", "1111", seed=1)))
    assert mean_course(other, "noise_off", "recovered") is None, "evaluated after other steps"
