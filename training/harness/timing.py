"""Interleaved timing: in every round each method runs once, and ratios are taken within a round."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a method took.

    Attributes:
        seconds: median over the rounds.
        ratio: median of its time over the baseline's in the same round.
        low: lower quartile of that ratio.
        high: upper quartile.
    """

    seconds: float
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f}-{self.high:.2f})"


def compare(
    methods: Mapping[str, Callable[[], object]], baseline: str, rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Times all methods interleaved, after one untimed round.

    Args:
        methods: by name; each call is one run.
        baseline: the name of the method that ratios are taken to.
        rounds: how often each runs.
        device: where they run; a clock is read when its work is done.

    Raises:
        ValueError: fewer than 3 rounds, or no such baseline.
    """
    if rounds < 3 or baseline not in methods:
        raise ValueError(
            f"expected at least 3 rounds and a baseline among {list(methods)}, got {rounds}, {baseline!r}."
        )
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for name in methods:
        _time(methods[name], device)
    for turn in range(rounds):
        names = list(methods)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # no method always follows the same one
            seconds[name].append(_time(methods[name], device))
    return {name: _summary(values, seconds[baseline]) for name, values in seconds.items()}


def _summary(values: list[float], baseline: list[float]) -> Timing:
    ratios = [value / base for value, base in zip(values, baseline, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(statistics.median(values), middle, low, high)


def _time(method: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    method()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
