"""The exact side of gradient quality against independent computations, and the coverage of its statistics."""

import itertools
import math

import pytest
import torch
from plain_estimators import jacobian_times, one_hot, reinmax
from scipy import stats

from harness.gradient_problems import (
    LOSSES,
    exact_gradient,
    expected_loss,
    leave_one_out_variance,
    loss_spread,
    one_row,
    pair_expectation,
    score_variance,
    straight_through_limit,
    two_rows,
)
from harness.gradient_statistics import (
    FALSE_ALARM,
    against_each_other,
    against_truth,
    assess,
    bernstein_limit,
    variances_against,
    variances_compared,
)

PROBLEMS = {
    **{f"one row, n={n}": one_row(n, 1) for n in (2, 5, 12)},
    "weights": one_row(4, 1, of_weights=True),
    "two rows": two_rows(4, 1),
}


def outcomes(problem, scores):
    """(choices, probability, value that the loss sees) of every outcome, one by one."""
    first = scores[0].softmax(-1)
    for i in range(problem.keys):
        if problem.coupling is None:
            yield (i,), first[i], problem.values[0, i]
            continue
        second = (scores[1] + problem.coupling @ problem.values[0, i]).softmax(-1)
        for j in range(problem.keys):
            yield (i, j), first[i] * second[j], problem.values[1, j]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", LOSSES)
def test_exact_gradient_is_the_slope_of_the_sum_over_outcomes(name, kind):
    problem = PROBLEMS[name]
    loss = problem.losses[kind]

    def total(scores):
        return sum(float(p) * float(loss(value)) for _, p, value in outcomes(problem, scores))

    assert total(problem.scores) == pytest.approx(float(expected_loss(problem, loss, problem.scores)), rel=1e-12)
    step, slopes = 1e-5, []
    for row, key in itertools.product(range(problem.rows), range(problem.keys)):
        shift = torch.zeros_like(problem.scores)
        shift[row, key] = step
        slopes.append((total(problem.scores + shift) - total(problem.scores - shift)) / (2 * step))
    torch.testing.assert_close(
        exact_gradient(problem, loss), torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("keys", [2, 4, 9])
def test_limit_is_what_reinmax_expects_at_tau_one(keys, kind):
    """Enumerated over the choices from ReinMax's own formula: another way to the same sum."""
    problem = one_row(keys, 2)
    values, loss = problem.values[0], problem.losses[kind]

    def slope(weights):
        at = (weights @ values).requires_grad_()
        return torch.autograd.grad(loss(at).sum(), at)[0] @ values.T

    scores = problem.scores.expand(keys, -1)
    expected = problem.scores[0].softmax(-1) @ reinmax(scores, slope, 1.0, torch.arange(keys))
    torch.testing.assert_close(straight_through_limit(problem, loss), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_limit_of_stacked_rows_is_what_reinmax_expects_at_tau_one(kind):
    problem = two_rows(3, 2)
    loss, eye = problem.losses[kind], torch.eye(3, dtype=torch.float64)
    total = torch.zeros(2, 3, dtype=torch.float64)
    for (i, j), probability, value in outcomes(problem, problem.scores):
        at = value.clone().requires_grad_()
        slope = torch.autograd.grad(loss(at), at)[0] @ problem.values[1].T
        second = (problem.scores[1] + problem.coupling @ problem.values[0, i]).softmax(-1)
        lower = 2 * jacobian_times((eye[j] + second) / 2, slope) - jacobian_times(second, slope) / 2
        handed = problem.values[0] @ (problem.coupling.T @ lower)
        first = problem.scores[0].softmax(-1)
        upper = 2 * jacobian_times((eye[i] + first) / 2, handed) - jacobian_times(first, handed) / 2
        total += probability * torch.stack([upper, lower])
    torch.testing.assert_close(straight_through_limit(problem, loss), total.flatten(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_limit_is_exact_for_linear_and_quadratic_losses_of_one_row_only(seed):
    for problem in (one_row(2 + seed, seed), one_row(2 + seed, seed, of_weights=True), two_rows(2 + seed, seed)):
        for kind, loss in problem.losses.items():
            truth = exact_gradient(problem, loss)
            relative = float((straight_through_limit(problem, loss) - truth).norm() / truth.norm())
            if problem.rows == 1 and kind in ("linear", "quadratic"):
                assert relative < 1e-12
            else:
                assert relative > 1e-3


def test_limit_of_a_cubic_loss_of_the_weights_is_half_as_much_again():
    """f(w) = sum a_k w_k^3: the trapezoid over an edge is 3/2 (a_k - a_j), the truth a_k - a_j."""
    problem = one_row(6, 0, of_weights=True)
    loss = problem.losses["cubic"]
    torch.testing.assert_close(straight_through_limit(problem, loss), 1.5 * exact_gradient(problem, loss))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_pair_expectation_is_the_integral_over_the_noise(tau, hard):
    """The trapezoidal rule over G1 - G2, which is logistic, of one sample's gradient; apart where the choice jumps."""
    problem = one_row(2, 4)
    scores, values = problem.scores[0], problem.values[0]
    middle = float(scores[1] - scores[0])
    for kind, loss in problem.losses.items():
        expected = 0.0
        for low, high, choice in ((-40.0, middle, 1), (middle, 40.0, 0)):
            noise = torch.linspace(low, high, 40_001, dtype=torch.float64)
            p = ((scores + torch.stack([noise, torch.zeros_like(noise)], -1)) / tau).softmax(-1)
            weights = one_hot(torch.full_like(noise, choice, dtype=torch.int64), 2) if hard else p
            at = (weights @ values).requires_grad_()
            slope = torch.autograd.grad(loss(at).sum(), at)[0] @ values.T
            density = torch.from_numpy(stats.logistic.pdf(noise.numpy()))
            expected += float(torch.trapezoid(jacobian_times(p, slope)[:, 0] / tau * density, noise))
        found = pair_expectation(problem, loss, tau, hard=hard)
        assert float(found[0]) == pytest.approx(expected, abs=1e-5), kind
        assert float(found.sum()) == 0


def test_pair_expectation_tends_to_the_truth_and_to_the_trapezoid():
    problem = one_row(2, 4)
    for loss in problem.losses.values():
        for hard, limit in ((False, exact_gradient(problem, loss)), (True, straight_through_limit(problem, loss))):
            near = pair_expectation(problem, loss, 1e-5, hard=hard)
            torch.testing.assert_close(near, limit, rtol=1e-3, atol=1e-4)


def test_pair_expectation_needs_two_keys():
    with pytest.raises(ValueError, match="expected one row of two keys, got 1 of 3"):
        pair_expectation(one_row(3, 0), one_row(3, 0).losses["linear"], 1.0, hard=True)


@pytest.mark.parametrize("name", ["one row, n=2", "two rows"])
def test_enumerated_variances_are_those_of_the_definition(name):
    """K = 2 choices: every pair of outcomes, one by one."""
    problem = PROBLEMS[name]
    loss = problem.losses["mlp"]
    singles = []
    for choices, probability, value in outcomes(problem, problem.scores):
        rows = [problem.scores[0].softmax(-1)]
        if problem.rows == 2:
            rows.append((problem.scores[1] + problem.coupling @ problem.values[0, choices[0]]).softmax(-1))
        score = torch.cat([one_hot(torch.tensor(c), problem.keys) - p for c, p in zip(choices, rows, strict=True)])
        singles.append((float(probability), float(loss(value)), score))
    truth = exact_gradient(problem, loss)
    plain = sum(p * float((f * s - truth).square().sum()) for p, f, s in singles)
    pairs = itertools.product(singles, repeat=2)
    both = sum(p * q * float(((f - g) * (s - t) / 2 - truth).square().sum()) for (p, f, s), (q, g, t) in pairs)
    assert score_variance(problem, loss) == pytest.approx(plain)
    assert leave_one_out_variance(problem, loss, 2) == pytest.approx(both)
    mean = sum(p * f for p, f, _ in singles)
    assert loss_spread(problem, loss) == pytest.approx(math.sqrt(sum(p * (f - mean) ** 2 for p, f, _ in singles)))


# --- statistics ---------------------------------------------------------------------------------------------------


def skewed(generator, *shape):
    """Centred exponential draws mixed over the last dimension: skewness about 1.5, correlated components."""
    mixing = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.7, 0.2], [0.0, 0.0, 0.1]], dtype=torch.float64)
    return (torch.empty(*shape, 3, dtype=torch.float64).exponential_(generator=generator) - 1) @ mixing


@pytest.mark.parametrize("bias", [0.0, 0.02, 1.0])
def test_interval_of_the_bias_covers_it(bias):
    """95% or more of 400 intervals, less a margin of false-alarm rate 1e-6; control: intervals half as wide."""
    generator = torch.Generator().manual_seed(5)
    truth = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    shift = bias * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    found = [assess(skewed(generator, 500) + truth + shift, truth) for _ in range(400)]
    lowest = stats.binom.ppf(FALSE_ALARM, 400, 0.95)
    assert sum(q.bias_low <= bias <= q.bias_high for q in found) >= lowest
    if bias == 0.0:
        assert sum(q.bias - (q.bias_high - q.bias) / 2 <= 0 for q in found) < lowest
    assert all(q.bias - q.radius <= bias <= q.bias + q.radius for q in found)


def test_unbiased_estimates_stay_below_the_limit_and_biased_ones_exceed_it():
    """1,000 components at once; false-alarm rate 1e-6 in all."""
    generator = torch.Generator().manual_seed(6)
    truth = torch.zeros(3, dtype=torch.float64)
    good = [assess(skewed(generator, 1000), truth) for _ in range(333)]
    biased = [assess(skewed(generator, 1000) + 0.4, truth)]
    found = against_truth([*good, *biased])
    assert [item.differs for item in found] == [False] * 333 + [True]
    assert not any(item.differs for item in against_each_other(list(zip(good[:-1:2], good[1::2], strict=True))))
    assert against_each_other([(good[0], biased[0])])[0].differs


def test_variances_are_told_apart_and_equal_ones_are_not():
    generator = torch.Generator().manual_seed(7)
    truth = torch.zeros(3, dtype=torch.float64)
    wide, same, narrow = (assess(c * skewed(generator, 50_000), truth) for c in (1.0, 1.0, 0.8))
    found = variances_compared([(wide, same), (narrow, wide), (wide, narrow)])
    assert [(item.lower, item.higher) for item in found] == [(False, False), (True, False), (False, True)]
    exact = 1 + 0.5**2 + 0.7**2 + 0.2**2 + 0.1**2
    assert [item.differs for item in variances_against([(wide, exact), (wide, 1.3 * exact)])] == [False, True]


def test_a_constant_estimate_has_no_interval():
    truth = torch.tensor([1.0, 0.0])
    found = assess(torch.tensor([[1.0, 1.0]]), truth)
    assert (found.bias, found.bias_low, found.bias_high, found.variance) == (1.0, 1.0, 1.0, 0.0)
    assert found.cosine == pytest.approx(math.sqrt(0.5))
    exact = assess(truth.expand(1, -1), truth)
    assert exact.closer_than(found)
    assert [item.differs for item in against_truth([exact, found])] == [False, True]


def test_bernstein_limit_is_the_normal_one_for_small_reach_and_grows_with_it():
    assert bernstein_limit(0.0, 1) == pytest.approx(math.sqrt(2 * math.log(2e6)))
    assert bernstein_limit(0.0, 1) > stats.norm.isf(FALSE_ALARM / 2)
    t = bernstein_limit(0.3, 10)
    assert 10 * 2 * math.exp(-(t**2) / (2 * (1 + t * 0.3 / 3))) == pytest.approx(FALSE_ALARM)
