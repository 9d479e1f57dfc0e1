"""The speeds that this library is held to, and the settings of the benchmark that measure them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from harness.contenders import FLASH, SDPA
from harness.training_step import UNPATCHED

FORWARD, BOTH = "forward", "forward+backward"


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio that must keep to a bar.

    Attributes:
        kind: "time" or "memory" of one attention, or "step" for the time of a training step.
        method: the numerator.
        over: the denominator.
        bar: the ratio must be at most this; with ``faster``, at least.
        aim: what it should be; None where the bar is all.
        faster: the ratio is that of ``over`` to ``method``: how many times faster the method is.
    """

    kind: Literal["time", "memory", "step"]
    method: str
    over: str
    bar: float
    aim: float | None = None
    faster: bool = False
    direction: str = ""
    length: int = 0
    head_dim: int = 0

    @property
    def what(self) -> str:
        """The ratio, in words."""
        if self.kind == "step":
            return f"training step, {self.method} over {self.over}"
        pair = f"{self.method} faster than {self.over}" if self.faster else f"{self.method} over {self.over}"
        subject = "extra memory, " if self.kind == "memory" else ""
        return f"{subject}{pair}, {self.direction}, N={self.length}, d={self.head_dim}"

    def met(self, ratio: float) -> bool:
        """Whether a ratio keeps to the bar."""
        return ratio >= self.bar if self.faster else ratio <= self.bar


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of the benchmark, as its command line names them, and what must come of them."""

    settings: Mapping[str, Any]
    targets: tuple[Target, ...]


def _h100() -> tuple[Target, ...]:
    bars = [
        ("gumbel-soft", FORWARD, 64, 2.0, 1.5),
        ("gumbel-soft", FORWARD, 128, 1.5, 1.2),
        ("gumbel-st", FORWARD, 64, 1.6, 1.25),
        ("gumbel-st", FORWARD, 128, 1.2, 0.9),
        *((arm, BOTH, 64, 2.1, 1.2) for arm in ("gumbel-soft", "gumbel-st")),
        *((arm, BOTH, 128, 1.65, 1.0) for arm in ("gumbel-soft", "gumbel-st")),
        ("det-st", FORWARD, 128, 1.0, 0.7),
    ]
    return tuple(
        Target("time", f"triton {arm}", FLASH, bar, aim, direction=direction, length=8192, head_dim=head_dim)
        for arm, direction, head_dim, bar, aim in bars
    )


def _cpu() -> tuple[Target, ...]:
    soft, st = "cpu gumbel-soft", "cpu gumbel-st"
    textbook = {soft: "F.gumbel_softmax soft", st: "F.gumbel_softmax hard"}
    targets = []
    for head_dim in (64, 128):
        short = {"length": 512, "head_dim": head_dim}
        long = {"length": 2048, "head_dim": head_dim}
        targets += [
            Target("time", soft, SDPA, 2.0, 1.5, direction=FORWARD, **long),
            *(Target("time", method, SDPA, 1.8, 1.25, direction=BOTH, **long) for method in textbook),
            *(Target("time", ours, its, 10.0, 18.0, True, FORWARD, **long) for ours, its in textbook.items()),
            *(Target("time", ours, its, 3.5, 6.0, True, BOTH, **long) for ours, its in textbook.items()),
            Target("time", soft, SDPA, 2.5, 1.7, direction=FORWARD, **short),
            *(Target("time", method, SDPA, 2.5, 1.7, direction=BOTH, **short) for method in textbook),
        ]
    memory = [
        Target("memory", method, SDPA, 1.5, 1.1, direction=BOTH, length=16384, head_dim=64) for method in textbook
    ]
    steps = [
        Target("step", "gumbel-st", UNPATCHED, 1.25, 1.10),
        Target("step", "softmax", UNPATCHED, 1.05, 1.0),
    ]
    return tuple(targets + memory + steps)


PRESETS: Mapping[str, Preset] = {
    "h100": Preset(
        {
            "device": "cuda",
            "dtype": "bfloat16",
            "check_dtypes": ["float32", "float16"],
            "check_processes": 8,
            "lengths": [8192, 512, 2048, 16384, 65536],  # the first is what the targets are about
            "head_dims": [64, 128],
            "heads": 16,
            "causal": [8192],
            "rounds": 9,
            "time_limit": 8.0,
            "total_limit": 420.0,
            "memory_lengths": [8192, 16384],
            "memory_heads": 16,
            "model": "bert-base-shape",
            "model_batch": 16,
            "model_length": 512,
            "output_dir": "results/benchmark_h100",
        },
        _h100(),
    ),
    "cpu": Preset(
        {
            "device": "cpu",
            "dtype": "float32",
            "lengths": [512, 2048],
            "head_dims": [64, 128],
            "heads": 16,
            "rounds": 11,
            "memory_lengths": [16384],
            "memory_heads": 1,
            "model": "minilm",
            "model_batch": 8,
            "model_length": 128,
            "output_dir": "results/benchmark_cpu",
        },
        _cpu(),
    ),
}
