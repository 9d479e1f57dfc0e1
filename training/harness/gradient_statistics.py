"""Bias, variance and direction of a gradient estimator, from independent estimates and the exact gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

FALSE_ALARM = 1e-6
CONFIDENCE = 0.95
COMPARISONS = 10_000
_QUANTILE_DRAWS = 20_000


@dataclass(frozen=True)
class Quality:
    """What the estimates say.

    Attributes:
        estimates: how many there are; 1 for an estimator without noise.
        mean: (d,) their mean.
        error: (d,) its standard error.
        reach: (d,) the largest deviation from the mean over sqrt(estimates) times the standard deviation: how far one
            estimate can move the standardised mean.
        truth: (d,) the exact gradient.
        bias: length of mean - truth.
        bias_low: lower end of its confidence interval, see :func:`assess`.
        bias_high: upper end.
        radius: half the length of the much wider interval by which two biases are compared, see :meth:`closer_than`.
        variance: total variance of one estimate, the trace of its covariance.
        variance_error: standard error of that.
        variance_reach: as ``reach``, for the variance.
        cosine: of the angle between mean and truth.
    """

    estimates: int
    mean: Tensor
    error: Tensor
    reach: Tensor
    truth: Tensor
    bias: float
    bias_low: float
    bias_high: float
    radius: float
    variance: float
    variance_error: float
    variance_reach: float
    cosine: float

    @property
    def scale(self) -> float:
        """Length of the exact gradient."""
        return float(self.truth.norm())

    @property
    def relative_bias(self) -> float:
        """The bias in units of the exact gradient's length."""
        return self.bias / self.scale

    def closer_than(self, other: Quality) -> bool:
        """Whether its bias is the lower one, beyond what chance explains.

        Wrong with a probability of at most :data:`FALSE_ALARM` in all of :data:`COMPARISONS` comparisons together.
        """
        return self.bias + self.radius < other.bias - other.radius

    def bias_above(self, length: float) -> bool:
        """Whether its bias is longer than that, at the rate of :meth:`closer_than`."""
        return self.bias - self.radius > length


@dataclass(frozen=True)
class Comparison:
    """A standardised difference, and the size that chance does not give it at the stated rate."""

    z: float
    limit: float

    @property
    def differs(self) -> bool:
        """Whether chance does not explain it."""
        return abs(self.z) > self.limit

    @property
    def lower(self) -> bool:
        """Whether the first is below the second by more than chance explains."""
        return self.z < -self.limit

    @property
    def higher(self) -> bool:
        """Whether it is above."""
        return self.z > self.limit


def assess(estimates: Tensor, truth: Tensor) -> Quality:
    """Summarises independent estimates of a gradient.

    The interval of the bias holds the length of the true bias with at least 95% probability, wherever that lies, zero
    included: lengths differ by no more than vectors do, | |m - t| - |E m - t| | <= |m - E m|, and the right-hand side
    stays below the 95% quantile of the length of a normal vector with the mean's covariance. It covers more than 95%
    where the bias is large beside its error. Means are taken to be normal.

    Args:
        estimates: (count, d).
        truth: (d,).
    """
    count = len(estimates)
    x = estimates.double()
    mean = x.mean(0)
    bias = float((mean - truth).norm())
    zero = torch.zeros_like(mean)
    cosine = float(torch.nn.functional.cosine_similarity(mean, truth, dim=0))
    if count == 1:
        return Quality(1, mean, zero, zero, truth, bias, bias, bias, 0.0, 0.0, 0.0, 0.0, cosine)
    centred = x - mean
    covariance = centred.T @ centred / (count - 1)
    error = covariance.diagonal().div(count).sqrt()
    squares = centred.square().sum(-1)
    variance, variance_error = squares.sum() / (count - 1), squares.std() / math.sqrt(count)
    half_width = _length_quantile(covariance / count)
    return Quality(
        estimates=count,
        mean=mean,
        error=error,
        reach=_reach(centred, error),
        truth=truth,
        bias=bias,
        bias_low=max(0.0, bias - half_width),
        bias_high=bias + half_width,
        radius=_sure_radius(covariance / count),
        variance=float(variance),
        variance_error=float(variance_error),
        variance_reach=float(_reach(squares[:, None] - squares.mean(), variance_error)),
        cosine=cosine,
    )


def _reach(centred: Tensor, error: Tensor) -> Tensor:
    return torch.where(error > 0, centred.abs().amax(0) / (len(centred) * error), 0.0)


def _sure_radius(covariance: Tensor) -> float:
    """A length that a normal vector exceeds with a probability of at most FALSE_ALARM / COMPARISONS.

    P(|X| > E|X| + t) <= exp(-t^2 / (2 lambda)), lambda the largest eigenvalue, and E|X| <= sqrt(trace).
    """
    largest = float(torch.linalg.eigvalsh(covariance)[-1])
    tail = math.log(COMPARISONS / FALSE_ALARM)
    return math.sqrt(float(covariance.trace())) + math.sqrt(2 * max(largest, 0.0) * tail)


def _length_quantile(covariance: Tensor) -> float:
    """95% quantile of the length of a normal vector with this covariance, by simulation with a fixed seed."""
    spectrum = torch.linalg.eigvalsh(covariance).clamp(min=0)
    squares = _squares(len(spectrum)) @ spectrum
    return float(squares.kthvalue(round(CONFIDENCE * _QUANTILE_DRAWS)).values.sqrt())


@cache
def _squares(dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_QUANTILE_DRAWS, dim, generator=generator, dtype=torch.float64).square()


def against_truth(qualities: Sequence[Quality]) -> list[Comparison]:
    """Each estimator's largest |mean - truth| of a component over its standard error, and the limit for unbiased ones.

    The limits hold for all components of all these estimators together: if none is biased, any one is exceeded with a
    probability of at most :data:`FALSE_ALARM` (Bernstein's inequality, with the sample's standard deviation and
    largest deviation in place of the unknown true ones; a union bound over the components).
    """
    tests = sum(len(quality.mean) for quality in qualities)
    return [_compare(q.mean - q.truth, q.error, q.reach, tests) for q in qualities]


def against_each_other(pairs: Sequence[tuple[Quality, Quality]]) -> list[Comparison]:
    """The same for the means of two estimators that should agree, from independent samples."""
    tests = sum(len(first.mean) for first, _ in pairs)
    result = []
    for first, second in pairs:
        error = torch.hypot(first.error, second.error)
        furthest = torch.maximum(first.reach * first.error, second.reach * second.error)
        reach = torch.where(error > 0, furthest / error, 0.0)
        result.append(_compare(first.mean - second.mean, error, reach, tests))
    return result


def _compare(difference: Tensor, error: Tensor, reach: Tensor, tests: int) -> Comparison:
    """The component that comes closest to its own limit, or exceeds it furthest."""
    rounding = 1e-6 * (1 + difference.abs().max())
    z = torch.where(error > rounding * 1e-3, difference.abs() / error, difference.abs() / rounding)
    limits = torch.tensor([bernstein_limit(float(value), tests) for value in reach])
    worst = int((z / limits).argmax())
    return Comparison(float(z[worst]), float(limits[worst]))


def bernstein_limit(reach: float, tests: int, rate: float = FALSE_ALARM) -> float:
    """The z that a mean of bounded variables exceeds, in any of so many tests, with at most this probability.

    Bernstein: P(abs(z) > t) <= 2 exp(-t^2 / (2 (1 + t reach / 3))), solved for t at rate / tests.
    """
    log = math.log(2 * tests / rate)
    return log * reach / 3 + math.sqrt((log * reach / 3) ** 2 + 2 * log)


def variances_compared(pairs: Sequence[tuple[Quality, Quality]]) -> list[Comparison]:
    """First total variance less the second, standardised, with limits for all together.

    The standard errors are added, which covers samples that depend on each other too.
    """
    result = []
    for first, second in pairs:
        error = first.variance_error + second.variance_error
        furthest = max(q.variance_reach * q.variance_error for q in (first, second))
        difference = first.variance - second.variance
        if error == 0:
            result.append(Comparison(0.0 if difference == 0 else math.copysign(math.inf, difference), 1.0))
        else:
            result.append(Comparison(difference / error, bernstein_limit(furthest / error, len(pairs))))
    return result


def variances_against(pairs: Sequence[tuple[Quality, float]]) -> list[Comparison]:
    """Sampled total variance less the exact one, standardised, with limits for all together."""
    return [
        Comparison((q.variance - exact) / q.variance_error, bernstein_limit(q.variance_reach, len(pairs)))
        for q, exact in pairs
    ]
