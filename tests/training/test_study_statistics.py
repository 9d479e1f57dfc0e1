"""Paired statistics: reference values, share of false alarms by simulation, power as predicted, and degenerate data.

Simulations have a fixed seed. A correct implementation would fail each of these tests for one seed in a million.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from harness.errors import UsageError
from study.statistics import (
    Comparison,
    bootstrap_interval,
    compare,
    hedges_factor,
    holm,
    pair,
    paired_t,
    power,
    resolution,
    sign_flip_floor,
    sign_flip_p,
    smallest_visible,
    student_interval,
)

FALSE_ALARM = 1e-6
STUDIES, QUESTIONS, SEEDS = 10_000, 6, 5
DIFFERENCES = [0.012, 0.031, -0.004, 0.020, 0.017]


def compared(differences) -> Comparison:
    return compare(pair(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0)))


def at_most(share: float, trials: int = STUDIES) -> int:
    """The count that binomial chance exceeds once in a million."""
    return int(stats.binom.isf(FALSE_ALARM, trials, share))


def at_least(share: float, trials: int = STUDIES) -> int:
    return int(stats.binom.ppf(FALSE_ALARM, trials, share))


def plain_t(d):
    """p of the paired t-test without the rule for ties; 0 where all differences are one value but 0."""
    mean, deviation = d.mean(-1), d.std(-1, ddof=1)
    t = np.where(mean == 0, 0.0, np.inf)
    t = np.divide(np.abs(mean), deviation / math.sqrt(d.shape[-1]), out=t, where=deviation > 1e-12)
    return 2 * stats.t.sf(t, d.shape[-1] - 1)


def false_alarms(draw, p_of=lambda d: paired_t(d)[1], correct=holm, seeds=SEEDS) -> int:
    """Number of simulated studies without any difference of arms in which some question finds one."""
    d = draw(np.random.default_rng(7), (STUDIES, QUESTIONS, seeds))
    return int((correct(p_of(d)) <= 0.05).any(-1).sum())


def normal(rng, size):
    return rng.standard_normal(size)


def heavy(rng, size):
    """Normal, but one run in ten of either arm fails."""
    return rng.standard_normal(size) + 30.0 * (rng.random(size) < 0.1) - 30.0 * (rng.random(size) < 0.1)


def accuracy_of(examples, share):
    return lambda rng, size: (rng.binomial(examples, share, size) - rng.binomial(examples, share, size)) / examples


def skewed_metric(rng, size):
    return rng.exponential(size=size) - rng.exponential(size=size)


def one_example(rng, size):
    """Differences of -1, 0 or 1 test example."""
    return rng.choice([-1.0, 0.0, 1.0], p=[0.4, 0.2, 0.4], size=size)


def one_or_two_examples(rng, size):
    return rng.choice([-2.0, -1.0, 1.0, 2.0], size=size)


ALIKE = {
    "normal": normal,
    "heavy tails": heavy,
    "skewed metric": skewed_metric,
    "accuracy 0.9 of 872": accuracy_of(872, 0.9),
    "accuracy 0.999 of 1000": accuracy_of(1000, 0.999),
    "accuracy 0.8 of 20": accuracy_of(20, 0.8),
    "one example": one_example,
    "one or two examples": one_or_two_examples,
}


@pytest.mark.parametrize("name", ALIKE)
def test_studies_of_equal_arms_raise_at_most_the_stated_share_of_false_alarms(name):
    assert false_alarms(ALIKE[name]) <= at_most(0.05)


def test_for_normal_differences_the_share_is_exact():
    """Holm's first step on six independent tests: 1 - (1 - 0.05 / 6)^6 = 0.049."""
    alarms = false_alarms(normal)
    share = 1 - (1 - 0.05 / QUESTIONS) ** QUESTIONS
    assert at_least(share) <= alarms <= at_most(share)


@pytest.mark.parametrize("name", ["one example", "one or two examples"])
def test_control_without_the_rule_for_ties_there_are_too_many(name):
    assert false_alarms(ALIKE[name], plain_t) > at_most(0.05)


def test_control_without_correction_there_are_too_many():
    assert false_alarms(normal, correct=lambda p: p) > at_most(0.05)


def test_control_normal_quantiles_in_place_of_students_are_too_many():
    assert false_alarms(normal, lambda d: 2 * stats.norm.sf(np.abs(paired_t(d)[0]))) > at_most(0.05)


def uniform(rng, size):
    return rng.random(size) - 0.5


def coarse_grid(rng, size):
    """One to five test examples, either way."""
    return rng.choice([-1.0, 1.0], size=size) * rng.integers(1, 6, size=size)


def skewed(rng, size):
    """Of mean 0, but not symmetric: no two arms that are alike."""
    return rng.exponential(size=size) - 1


def two_points(rng, size):
    return rng.choice([-1.0, 1.0], size=size) + 0.05 * rng.standard_normal(size)


@pytest.mark.parametrize(
    ("draw", "five", "ten"),
    [(uniform, 0.10, 0.07), (coarse_grid, 0.14, 0.08), (skewed, 0.25, 0.23), (two_points, 0.32, 0.12)],
)
def test_the_stated_limits_of_the_method(draw, five, ten):
    """What the module says few seeds cannot guard against: within binomial bounds of the numbers it names."""
    for seeds, share in {5: five, 10: ten}.items():
        assert at_least(share - 0.005) <= false_alarms(draw, seeds=seeds) <= at_most(share + 0.005)


@pytest.mark.parametrize(("seeds", "level"), [(3, 0.05), (5, 0.05), (5, 0.05 / 6), (10, 0.01)])
def test_a_planted_effect_is_found_with_the_predicted_power(seeds, level):
    effect = smallest_visible(2.0, seeds, level)
    d = effect + 2.0 * np.random.default_rng(3).standard_normal((STUDIES, seeds))
    found = int((paired_t(d)[1] <= level).sum())
    assert at_least(0.8) <= found <= at_most(0.8)


def test_pairing_finds_what_an_unpaired_test_misses():
    """Seeds that shift both arms alike: the predicted power is that of the differences."""
    rng = np.random.default_rng(5)
    shared = 5 * rng.standard_normal((STUDIES, SEEDS))
    first, second = (shared + shift + rng.standard_normal((STUDIES, SEEDS)) for shift in (3.0, 0.0))
    share = power(3 / math.sqrt(2), SEEDS, 0.05)
    assert at_least(share) <= (paired_t(first - second)[1] <= 0.05).sum() <= at_most(share)
    assert (stats.ttest_ind(first, second, axis=-1).pvalue <= 0.05).sum() < at_least(share)


@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
@pytest.mark.parametrize("level", [0.05, 0.005])
def test_power_is_that_of_the_noncentral_t(seeds, level):
    critical = stats.t.isf(level / 2, seeds - 1)
    for effect in (0.0, 0.3, 1.0, 2.0):
        shift = effect * math.sqrt(seeds)
        exact = stats.nct.sf(critical, seeds - 1, shift) + stats.nct.cdf(-critical, seeds - 1, shift)
        assert power(effect, seeds, level) == pytest.approx(exact, rel=1e-3, abs=1e-5)


def test_smallest_visible_difference_scales_and_falls_with_seeds():
    assert smallest_visible(0.0, 5, 0.05) == 0
    assert smallest_visible(3.0, 5, 0.05) == pytest.approx(3 * smallest_visible(1.0, 5, 0.05))
    assert smallest_visible(1.0, 5, 0.01) > smallest_visible(1.0, 5, 0.05) > smallest_visible(1.0, 10, 0.05)


def test_t_and_p_are_scipys_where_nothing_is_tied():
    d = np.random.default_rng(0).standard_normal((50, 7))
    t, p = paired_t(d)
    reference = stats.ttest_1samp(d, 0.0, axis=-1)
    np.testing.assert_allclose(t, reference.statistic)
    np.testing.assert_allclose(p, reference.pvalue)
    first, second = d[0] + 3, np.full(7, 3.0)
    result = compare(pair(dict(enumerate(first)), dict(enumerate(second))))
    related = stats.ttest_rel(first, second)
    assert (result.t, result.p) == (pytest.approx(related.statistic), pytest.approx(related.pvalue))
    interval = related.confidence_interval(0.95)
    assert (result.student.low, result.student.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_numbers_by_hand():
    """Mean 0.0152; squares of the deviations sum to 6.548e-4; the sign-flip p counts 2 * 2 of 32 sums of signs."""
    result = compared(DIFFERENCES)
    deviation = math.sqrt(6.548e-4 / 4)
    assert result.mean == pytest.approx(0.0152)
    assert result.deviation == pytest.approx(deviation)
    assert result.t == pytest.approx(0.0152 / deviation * math.sqrt(5))
    assert result.effect_size == pytest.approx(0.0152 / deviation)
    # J(4) = gamma(2) / (sqrt(2) gamma(1.5)) = sqrt(2 / pi)
    assert result.corrected_effect_size == pytest.approx(0.0152 / deviation * math.sqrt(2 / math.pi))
    assert result.sign_flip_p == pytest.approx(4 / 32)
    assert result.sign_flip_floor == 0.0625
    assert result.resolution == 0
    assert result.pairs == 5


def test_sign_flip_p_is_that_of_all_flips():
    rng = np.random.default_rng(2)
    for n in (2, 5, 8):
        d = rng.standard_normal(n)
        sums = [
            abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((-1, 1), repeat=n)
        ]
        expected = sum(total >= abs(d.sum()) - 1e-12 for total in sums) / 2**n
        assert sign_flip_p(d) == pytest.approx(expected)


@pytest.mark.parametrize("seeds", [2, 5, 6, 16])
def test_the_floor_is_what_equal_signs_give(seeds):
    assert sign_flip_p(np.arange(1.0, seeds + 1)) == pytest.approx(sign_flip_floor(seeds))


def test_more_seeds_are_flipped_at_random():
    d = np.arange(1.0, 18)
    assert sign_flip_floor(17) <= sign_flip_p(d) <= 1e-3
    assert sign_flip_p(d) == sign_flip_p(d)


def test_support_of_the_sign_flip_test():
    assert compared([1.0, 2.0, 3.0, 4.0, 5.5]).support() == "cannot tell"
    assert compared([1.0, 2.0, 3.0, 4.0, 5.5, 6.0]).support() == "agrees"
    assert compared([1.0, -2.0, 3.0, -4.0, 5.5, 6.0]).support() == "disagrees"


def test_hedges_factor_takes_the_bias_of_the_effect_size_away():
    d = 0.8 + np.random.default_rng(4).standard_normal((200_000, 6))
    effects = hedges_factor(5) * d.mean(-1) / d.std(-1, ddof=1)
    error = effects.std() / math.sqrt(len(effects))
    assert abs(effects.mean() - 0.8) < stats.norm.isf(FALSE_ALARM / 2) * error
    assert abs(effects.mean() / hedges_factor(5) - 0.8) > 10 * error


def test_holm_by_hand_and_along_the_last_dimension():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([[0.5, 0.9], [0.02, 0.03]]), [[1.0, 1.0], [0.04, 0.04]])
    assert holm([0.3]) == 0.3
    assert holm([]).shape == (0,)


def test_intervals_of_few_normal_differences():
    """The Student-t interval covers in 95 % of cases; the bootstrap does not, as the module says."""
    rng, trials = np.random.default_rng(6), 200
    student = boot = 0
    for _ in range(trials):
        d = rng.standard_normal(5)
        t, b = student_interval(d), bootstrap_interval(d)
        student += t.low <= 0 <= t.high
        boot += b.low <= 0 <= b.high
    assert student >= at_least(0.95, trials)
    assert boot < at_least(0.95, trials)
    assert at_least(0.85, trials) <= boot <= at_most(0.85, trials)


def test_student_interval_leaves_out_zero_iff_the_test_finds_a_difference():
    for d in np.random.default_rng(8).standard_normal((200, 4)) + 1:
        interval = student_interval(d)
        assert (interval.low <= 0 <= interval.high) == (paired_t(d)[1] > 0.05)


def test_bootstrap_is_bca_repeatable_and_falls_back():
    first, again = bootstrap_interval(DIFFERENCES), bootstrap_interval(DIFFERENCES)
    assert first == again
    assert first.method == "BCa"
    assert min(DIFFERENCES) <= first.low < 0.0152 < first.high <= max(DIFFERENCES)
    reference = stats.bootstrap((DIFFERENCES,), np.mean, method="BCa", n_resamples=20_000, rng=1).confidence_interval
    assert first.low == pytest.approx(reference.low, abs=1e-3)
    assert first.high == pytest.approx(reference.high, abs=1e-3)
    equal = bootstrap_interval([0.1 + 0.2, 0.3, 0.3])
    assert (equal.method, equal.low) == ("point", pytest.approx(0.3))


def test_all_differences_zero():
    result = compared([0.0] * 5)
    assert (result.mean, result.t, result.p, result.sign_flip_p) == (0, 0, 1, 1)
    assert (result.deviation, result.effect_size, result.corrected_effect_size) == (0, None, None)
    assert (result.student.low, result.student.high, result.bootstrap.method) == (0, 0, "point")


def test_equal_differences_are_no_proof():
    """Without variance the t-test would be certain; the visible grid, here the difference itself, keeps it sober."""
    result = compared([0.05] * 5)
    assert result.resolution == pytest.approx(0.05)
    assert result.t == pytest.approx(math.sqrt(5))
    assert result.p == pytest.approx(2 * stats.t.sf(math.sqrt(5), 4))
    assert result.effect_size is None
    first = {seed: 0.9 + seed / 7 for seed in range(5)}  # equal up to rounding
    other = pair(first, {seed: value - 0.05 for seed, value in first.items()})
    assert compare(other).p == pytest.approx(result.p)
    assert compare(other).deviation == 0


def test_resolution_is_the_grid_of_tied_values_alone():
    assert resolution([0.3, 0.1, 0.45]) == 0
    assert resolution([0.2, 0.2, 0.2]) == pytest.approx(0.2)
    assert resolution([0.5, 0.5, 0.75]) == pytest.approx(0.25)
    assert resolution([0.0, 0.0, 0.0]) == 0
    np.testing.assert_allclose(resolution([[1.0, 1.0, 4.0], [1.0, 2.0, 4.0]]), [1.0, 0.0])


def test_untied_differences_are_left_alone():
    d = np.random.default_rng(9).standard_normal((1000, 5))
    assert not resolution(d).any()
    np.testing.assert_allclose(paired_t(d)[1], plain_t(d))


def test_two_pairs_have_numbers_but_no_corrected_effect_size():
    result = compared([0.1, 0.3])
    assert result.corrected_effect_size is None
    assert result.sign_flip_floor == 0.5
    assert 0 < result.p < 1


def test_pairs_are_the_shared_seeds():
    pairs = pair({3: 0.5, 1: 0.25, 7: 0.9}, {1: 0.2, 3: 0.1, 4: 0.0, 5: 0.0})
    assert pairs.seeds == (1, 3)
    assert pairs.dropped == (4, 5, 7)
    np.testing.assert_allclose(pairs.differences, [0.05, 0.4])


def test_too_few_pairs_and_bad_values_are_refused():
    with pytest.raises(
        UsageError, match=r"at least 2 seeds that both arms finished, got 1 \(seeds \[1, 2\] and \[2\]\)"
    ):
        pair({1: 0.5, 2: 0.5}, {2: 0.5})
    with pytest.raises(UsageError, match=r"seed 2 has a metric that is not finite: 0\.5 and nan"):
        pair({1: 0.5, 2: 0.5}, {1: 0.1, 2: math.nan})
