"""Arms of the studies on samples of categorical variables: how each draws, and how its gradient gets to the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gumbel_attention as ga
from harness.errors import UsageError


class Sample(NamedTuple):
    """A draw of categorical variables.

    Attributes:
        weights: (..., variables, classes), one-hot or relaxed.
        log_prob: (...), of all the variables together; None where the gradient passes the weights.
    """

    weights: Tensor
    log_prob: Tensor | None


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train through a sample.

    Attributes:
        name: of the arm.
        meaning: what it does, for the legend of a table.
        settings: arguments of ``ga.gumbel_softmax_with_info``.
        fixed_tau: the arm's temperature; None takes the schedule's.
        softmax_gradient: the gradient of the hard sample is that of softmax(logits) without the noise.
        baseline: "none", "average", "leave_one_out" or "soft" for the score function; None where the weights carry
            the gradient.
        samples: samples of each loss that leave-one-out needs; 1 for the others.
    """

    name: str
    meaning: str
    settings: Mapping[str, Any]
    fixed_tau: float | None = None
    softmax_gradient: bool = False
    baseline: str | None = None
    samples: int = 1

    def tau(self, scheduled: float) -> float:
        """The temperature of this arm where the schedule has ``scheduled``."""
        return scheduled if self.fixed_tau is None else self.fixed_tau

    def draw(self, logits: Tensor, tau: float) -> Sample:
        """Draws each variable of logits (..., variables, classes)."""
        shape, rows = logits.shape, logits.flatten(0, -2)  # as one matrix: its noise is drawn fastest
        if self.softmax_gradient:
            hard = ga.gumbel_softmax(rows.detach(), hard=True)
            mean = ga.gumbel_softmax(rows, noise="none")
            return Sample((hard - mean.detach() + mean).reshape(shape), None)
        info = ga.gumbel_softmax_with_info(rows, self.tau(tau), **self.settings)
        if self.baseline is None:
            return Sample(info.weights.reshape(shape), None)
        assert info.log_prob is not None
        return Sample(info.weights.reshape(shape), info.log_prob.reshape(shape[:-1]).sum(-1))


_SCORE_FUNCTION = {"hard": True, "estimator": "score_function"}
_ALL = (
    Arm("gumbel-soft", "relaxed sample softmax((S + G) / tau)", {}),
    Arm("gumbel-st", "hard sample, gradient of the relaxed one with the same noise", {"hard": True}),
    Arm(
        "softmax-st",
        "hard sample by Gumbel-max, gradient of softmax(S): what Jang et al. (2017) call ST",
        {"hard": True},
        fixed_tau=1.0,
        softmax_gradient=True,
    ),
    Arm("det-st", "argmax of S without noise, gradient of softmax(S / tau)", {"hard": True, "noise": "none"}),
    Arm(
        "gumbel-rao",
        "hard sample, gradient of the mean of 4 relaxed samples given that choice (Paulus et al. 2021)",
        {"hard": True, "estimator": "gumbel_rao", "samples": 4},
    ),
    Arm(
        "reinmax",
        "hard sample, second-order gradient (Liu et al. 2023), tau 1 throughout",
        {"hard": True, "estimator": "reinmax"},
        fixed_tau=1.0,
    ),
    Arm("reinforce", "score function without a baseline", _SCORE_FUNCTION, baseline="none"),
    Arm(
        "reinforce-average",
        "score function, moving average of the losses as baseline",
        _SCORE_FUNCTION,
        baseline="average",
    ),
    Arm(
        "reinforce-loo",
        "score function, baseline the mean loss of the other samples",
        _SCORE_FUNCTION,
        baseline="leave_one_out",
        samples=4,
    ),
    Arm(
        "reinforce-soft",
        "score function, baseline the loss at softmax(S) (Deng et al. 2018)",
        _SCORE_FUNCTION,
        baseline="soft",
    ),
)
ARMS = {arm.name: arm for arm in _ALL}


def choose_arms(names: Sequence[str], known: Sequence[str]) -> list[Arm]:
    """The arms of these names, in the order given.

    Raises:
        UsageError: a name is unknown or stands there twice.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"unknown arm {unknown[0]!r}; there are {', '.join(known)}.")
    if not names or len(set(names)) < len(names):
        raise UsageError(f"each arm must be named once and at least one, got {' '.join(names) or 'none'}.")
    return [ARMS[name] for name in names]


class Objective:
    """Losses of samples -> the scalar whose gradient trains the logits; keeps the moving averages of its arm.

    Args:
        arm: whose samples the losses come from.
        columns: number of moving averages: 1 for all losses together, or one for each column of the losses.
    """

    def __init__(self, arm: Arm, columns: int = 1) -> None:
        self.arm = arm
        self._averages = [ga.MovingAverageBaseline() for _ in range(columns if arm.baseline == "average" else 0)]

    def __call__(self, losses: Tensor, sample: Sample, soft_losses: Callable[[], Tensor] | None = None) -> Tensor:
        """The mean of the losses, with the gradient of its expectation as the arm estimates it.

        Args:
            losses: (samples, columns), the loss of each sample.
            sample: the sample they are losses of.
            soft_losses: computes (columns,) losses at softmax(logits); for the baseline "soft".
        """
        if sample.log_prob is None:
            return losses.mean()
        return ga.score_function_loss(losses, sample.log_prob, baseline=self._baseline(losses.detach(), soft_losses))

    def _baseline(self, losses: Tensor, soft_losses: Callable[[], Tensor] | None) -> float | Tensor:
        if self.arm.baseline == "leave_one_out":
            return ga.leave_one_out(losses)
        if self.arm.baseline == "soft":
            assert soft_losses is not None
            with torch.no_grad():
                return soft_losses()
        if self.arm.baseline == "average":
            value = torch.stack([average.value for average in self._averages])
            for average, column in zip(
                self._averages, losses.split(losses.shape[1] // len(self._averages), 1), strict=True
            ):
                average.update(column)
            return value
        return 0.0
