"""Interleaved timing: in every round each method is sampled once, and ratios are taken within a round."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

OUT_OF_MEMORY = "out of memory"
TOO_SLOW = "too slow"
MOST_REPEATS = 1000


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median of the ratios within a round, and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one run of a method, a sample for each round."""

    samples: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.samples)

    def over(self, other: Timing) -> Ratio:
        """This method's time over another's in the same round.

        Raises:
            ValueError: the two were not timed in the same rounds.
        """
        ratios = [mine / its for mine, its in zip(self.samples, other.samples, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(middle, low, high)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        timings: by method, of those that ran in all rounds.
        left_out: by method, why there is no timing.
        single: seconds of one warm run, of all methods that have run at all.
    """

    timings: dict[str, Timing]
    left_out: dict[str, str]
    single: dict[str, float]


def compare(
    methods: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    time_limit: float = math.inf,
    sample_seconds: float = 0.0,
) -> Comparison:
    """Times all methods interleaved, after two untimed runs of each. A method that fails is left out, not the rest.

    Args:
        methods: by name; each call is one run.
        rounds: how often each is sampled.
        device: where they run; a clock is read when its work is done.
        time_limit: seconds that the rounds of one method may take.
        sample_seconds: a sample repeats its method until it takes about this long.

    Raises:
        ValueError: fewer than 3 rounds.
    """
    if rounds < 3:
        raise ValueError(f"expected at least 3 rounds, got {rounds}.")
    found = Comparison({}, {}, {})
    samples: dict[str, list[float]] = {}
    for name, method in methods.items():
        try:
            _time(method, 1, device)
            found.single[name] = _time(method, 1, device)
        except Exception as error:
            found.left_out[name] = reason_of(error, device)
            continue
        if rounds * found.single[name] > time_limit:
            found.left_out[name] = TOO_SLOW
        else:
            samples[name] = []
    repeats = {name: _repeats(found.single[name], sample_seconds) for name in samples}
    for turn in range(rounds):
        names = list(samples)
        shift = turn % max(1, len(names))
        for name in names[shift:] + names[:shift]:  # no method always follows the same one
            try:
                samples[name].append(_time(methods[name], repeats[name], device))
            except Exception as error:
                found.left_out[name] = reason_of(error, device)
                del samples[name]
    found.timings.update({name: Timing(tuple(samples[name])) for name in methods if name in samples})
    return found


def reason_of(error: Exception, device: torch.device) -> str:
    """Why a run failed, in a line; on a GPU the memory it held is given back.

    Raises:
        Exception: the error, if the device can compute nothing more.
    """
    text = str(error).strip()
    full = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "allocate memory" in text
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            raise error from None
        error.__traceback__ = None  # its frames hold tensors
        torch.cuda.empty_cache()
    return OUT_OF_MEMORY if full else f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def wait(device: torch.device) -> None:
    """Returns when the device's work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _repeats(seconds: float, sample_seconds: float) -> int:
    return min(MOST_REPEATS, max(1, math.ceil(sample_seconds / max(seconds, 1e-9))))


def _time(method: Callable[[], object], repeats: int, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        method()
    wait(device)
    return (time.perf_counter() - start) / repeats
