"""Paired comparisons over few seeds: tests, intervals, effect sizes, and what could have been seen.

Two arms are compared by the differences d of the seeds they share. How a verdict is reached (:mod:`study.verdicts`):

    A question counts as answered (better or worse) iff the p-value of the paired t-test, corrected by Holm over all
    questions of the study, is at most alpha. Nothing else decides.

Why the t-test and not the permutation test: with n seeds the sign-flip test has no p-value below 2 / 2^n, 0.0625 for
five, so it could never answer anything. Its p stands beside with that floor; :attr:`Comparison.support` says whether
it agrees, disagrees, or could not have spoken.

What the t-test rests on: normal differences. If two arms are alike, their differences are symmetric about 0, and then
the t-test keeps its level for accuracies of some hundred examples, and falls below it where a seed fails now and then.
It does not on a coarse grid: with differences of -1, 0 or 1 test example, four equal ones and a zero give p = 0.016,
and five equal ones p = 0. So where values are tied, the metric has a visible resolution, and the standard deviation is
taken to be at least that (:func:`resolution`). Untied values are left as they are: n of them have a standard deviation
above their smallest gap, from three on.

What is left, measured on families of six questions with five seeds (tests/training/test_study_statistics.py): at most
0.05 of the studies raise a false alarm for normal, heavy-tailed and accuracy-like differences of arms that are alike,
but 0.10 for uniform ones, 0.14 at worst for some coarse grids, 0.25 for exponential ones of mean 0, which are not
symmetric, and 0.32 where every seed differs by nearly the same amount and only the sign is chance. With ten seeds:
0.07, 0.08, 0.23 and 0.12.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from harness.errors import UsageError

ALPHA = 0.05
CONFIDENCE = 0.95
POWER = 0.8
EXACT_SEEDS = 16
_RESAMPLES = 9999
_TIE = 1e-9

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """Two arms on the seeds they share.

    Attributes:
        seeds: the shared ones, ascending.
        first: (n,) metric of the one arm.
        second: (n,) of the other.
        dropped: seeds that only one of the arms has.
    """

    seeds: tuple[int, ...]
    first: Floats
    second: Floats
    dropped: tuple[int, ...]

    @property
    def differences(self) -> Floats:
        """First minus second, (n,)."""
        return self.first - self.second


@dataclass(frozen=True)
class Interval:
    """An interval of the mean difference, and the method it is by: "t", "BCa", "percentile" or "point"."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Comparison:
    """What n paired differences say.

    Attributes:
        pairs: n.
        mean: mean difference, the raw effect.
        deviation: standard deviation of the differences.
        resolution: of the metric as far as ties show it, else 0; the t-test's standard deviation is at least that.
        student: Student-t interval of the mean.
        bootstrap: bootstrap interval. With few seeds it is too short: on five normal differences it holds the true
            mean in about 85 % of cases instead of 95 %; read the Student-t interval then.
        t: of the paired t-test; 0 if all differences are 0.
        p: of the paired t-test, two-sided, not corrected.
        sign_flip_p: of the sign-flip permutation test, two-sided; exact up to ``EXACT_SEEDS`` seeds.
        sign_flip_floor: the smallest p that test can give with n seeds.
        effect_size: Cohen's d_z, mean / deviation; None where the deviation is 0.
        corrected_effect_size: d_z times Hedges' factor for its bias; None for two pairs, where it has no mean.
    """

    pairs: int
    mean: float
    deviation: float
    resolution: float
    student: Interval
    bootstrap: Interval
    t: float
    p: float
    sign_flip_p: float
    sign_flip_floor: float
    effect_size: float | None
    corrected_effect_size: float | None

    def support(self, alpha: float = ALPHA) -> str:
        """What the sign-flip test says to a difference: "agrees", "disagrees", or too few seeds: "cannot tell"."""
        if self.sign_flip_floor > alpha:
            return "cannot tell"
        return "agrees" if self.sign_flip_p <= alpha else "disagrees"


def pair(first: Mapping[int, float], second: Mapping[int, float]) -> Pairs:
    """The seeds two arms share, from their metric by seed.

    Raises:
        UsageError: fewer than two shared seeds, or a value that is not finite.
    """
    shared = sorted(first.keys() & second.keys())
    dropped = tuple(sorted(first.keys() ^ second.keys()))
    if len(shared) < 2:
        raise UsageError(
            f"a paired comparison needs at least 2 seeds that both arms finished, got {len(shared)} "
            f"(seeds {sorted(first)} and {sorted(second)}). Run more seeds of both."
        )
    for seed in shared:
        if not (math.isfinite(first[seed]) and math.isfinite(second[seed])):
            raise UsageError(f"seed {seed} has a metric that is not finite: {first[seed]} and {second[seed]}.")
    columns = [np.array([arm[seed] for seed in shared], dtype=float) for arm in (first, second)]
    return Pairs(tuple(shared), *columns, dropped)


def compare(pairs: Pairs) -> Comparison:
    """All statistics of the differences of :class:`Pairs`."""
    d = pairs.differences
    scale = max(np.abs(pairs.first).max(), np.abs(pairs.second).max())
    d = np.where(np.abs(d) <= 1e-12 * scale, 0.0, d)  # what subtraction leaves of equal values
    n, mean, deviation = len(d), float(d.mean()), float(d.std(ddof=1))
    if np.ptp(d) <= _TIE * np.abs(d).max():
        deviation = 0.0
    t, p = paired_t(d)
    effect = mean / deviation if deviation > 0 else None
    return Comparison(
        pairs=n,
        mean=mean,
        deviation=deviation,
        resolution=float(resolution(d)),
        student=student_interval(d),
        bootstrap=bootstrap_interval(d),
        t=float(t),
        p=float(p),
        sign_flip_p=sign_flip_p(d),
        sign_flip_floor=sign_flip_floor(n),
        effect_size=effect,
        corrected_effect_size=None if effect is None or n < 3 else effect * hedges_factor(n - 1),
    )


def paired_t(differences: ArrayLike) -> tuple[Floats, Floats]:
    """The paired t-test along the last dimension, its standard deviation at least the :func:`resolution`.

    Args:
        differences: (..., n), n >= 2.

    Returns:
        t and the two-sided p, (...); 0 and 1 where all differences are 0.
    """
    d = np.asarray(differences, dtype=float)
    n = d.shape[-1]
    error = _deviation(d) / math.sqrt(n)
    t = np.divide(d.mean(-1), error, out=np.zeros(d.shape[:-1]), where=error > 0)
    return t, 2 * stats.t.sf(np.abs(t), n - 1)


def resolution(differences: ArrayLike) -> Floats:
    """The grid that tied differences lie on: the smallest gap between the distinct values, 0 among them.

    0 is a value, because equal differences without it would show no gap. Without ties there is no grid to be seen.

    Args:
        differences: (..., n).

    Returns:
        (...), 0 where no two values are equal, or all are 0.
    """
    d = np.asarray(differences, dtype=float)
    tolerance = _TIE * np.abs(d).max(-1, keepdims=True)
    own = np.diff(np.sort(d, -1), axis=-1)
    tied = (own <= tolerance).any(-1)
    gaps = np.diff(np.sort(np.concatenate([d, np.zeros_like(d[..., :1])], -1), -1), axis=-1)
    smallest = np.where(gaps > tolerance, gaps, np.inf).min(-1)
    return np.where(tied & np.isfinite(smallest), smallest, 0.0)


def _deviation(d: Floats) -> Floats:
    """The standard deviation that the t-test uses, (..., n) -> (...)."""
    plain: Floats = d.std(-1, ddof=1)
    return np.maximum(plain, resolution(d))


def student_interval(differences: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """The interval that belongs to :func:`paired_t`: at 95 % it leaves out 0 iff p < 0.05."""
    d = np.asarray(differences, dtype=float)
    half = float(_deviation(d)) / math.sqrt(len(d)) * float(stats.t.isf((1 - confidence) / 2, len(d) - 1))
    return Interval(float(d.mean()) - half, float(d.mean()) + half, "t")


def bootstrap_interval(differences: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """The bootstrap interval of the mean: BCa, percentile where that is undefined, a point if all are equal.

    The resamples come from a fixed seed: equal differences give equal intervals.
    """
    d = np.asarray(differences, dtype=float)
    mean = float(d.mean())
    if np.ptp(d) <= _TIE * np.abs(d).max():
        return Interval(mean, mean, "point")
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # BCa warns where it is undefined; the check below sees that
            found = stats.bootstrap(
                (d,), np.mean, n_resamples=_RESAMPLES, confidence_level=confidence, method=method, rng=0
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    return Interval(float(found.low), float(found.high), method)


def sign_flip_p(differences: ArrayLike) -> float:
    """Two-sided p of the permutation test that flips signs: exact up to ``EXACT_SEEDS``, else from random flips."""
    d = np.asarray(differences, dtype=float)
    exact = 2**EXACT_SEEDS
    result = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", vectorized=True, n_resamples=exact, batch=4096, rng=0
    )
    return float(result.pvalue)


def sign_flip_floor(seeds: int) -> float:
    """The smallest two-sided p of the sign-flip test: 2 / 2^n, of random flips 2 / (flips + 1)."""
    return 2.0 ** (1 - seeds) if seeds <= EXACT_SEEDS else 2 / (2**EXACT_SEEDS + 1)


def holm(p: ArrayLike) -> Floats:
    """Holm's corrected p-values along the last dimension.

    A corrected p of at most alpha has a family-wise error rate of at most alpha, however the tests depend on each
    other (Holm 1979).

    Args:
        p: (..., m).
    """
    values = np.asarray(p, dtype=float)
    m = values.shape[-1]
    order = np.argsort(values, -1, kind="stable")
    stepped = np.take_along_axis(values, order, -1) * np.arange(m, 0, -1)
    stepped = np.minimum(np.maximum.accumulate(stepped, -1), 1.0)
    corrected = np.empty_like(stepped)
    np.put_along_axis(corrected, order, stepped, -1)
    return corrected


def hedges_factor(freedom: int) -> float:
    """Hedges' factor J: d_z times J estimates the effect size without bias; ``freedom`` >= 2 degrees of freedom."""
    logs = special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2)
    return float(math.exp(logs) / math.sqrt(freedom / 2))


def power(effect: float, seeds: int, level: float) -> float:
    """The probability that the two-sided paired t-test at ``level`` finds a true difference.

    Exact for normal differences: 1 minus the mass of the noncentral t between the critical values, as the mean of
    normal probabilities over the distribution of the standard deviation (scipy's own noncentral t gives NaN for large
    effects).

    Args:
        effect: true mean difference in standard deviations.
        seeds: n >= 2.
        level: of the test, two-sided.
    """
    freedom = seeds - 1
    critical, shift = float(stats.t.isf(level / 2, freedom)), effect * math.sqrt(seeds)
    ratio, weights = _deviation_ratios(freedom)
    found = special.ndtr(shift - critical * ratio) + special.ndtr(-critical * ratio - shift)
    return float((found * weights).sum())


@functools.cache
def _deviation_ratios(freedom: int) -> tuple[Floats, Floats]:
    """Nodes and weights for means over observed / true standard deviation: Gauss-Legendre in its quantiles."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    return np.sqrt(stats.chi2.ppf((nodes + 1) / 2, freedom) / freedom), weights / 2


def smallest_visible(deviation: float, seeds: int, level: float, wanted: float = POWER) -> float:
    """The smallest true difference that the paired t-test at ``level`` finds with probability ``wanted``.

    The deviation is put in as if it were known; with few seeds it is itself uncertain (with five, the true one lies
    between 0.6 and 2.9 times the observed one with 95 % confidence), and so is the answer.

    Args:
        deviation: standard deviation of the differences.
        seeds: number of pairs.
        level: two-sided level of the test; alpha / m for one of m questions, the level that certainly suffices.
        wanted: the power.
    """
    if deviation == 0:
        return 0.0
    high = 1.0
    while power(high, seeds, level) < wanted:
        high *= 2
    effect = optimize.brentq(lambda x: power(x, seeds, level) - wanted, 0.0, high, xtol=1e-10)
    return float(effect) * deviation
