"""Estimators by Monte Carlo: what they sample, what they expect and how much they vary.

Every test asserts with a false-alarm rate of at most 1e-6 on a fresh seed, shared out among its comparisons; the
seeds are fixed, so that a pass stays a pass. Each has a control, a plausible mistake that the same test refuses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import gumbel_attention as ga
from gumbel_attention import estimators
from gumbel_attention.arguments import make_choice

FALSE_ALARM = 1e-6
SCORES = torch.tensor([1.2, -0.4, 0.5, 0.0], dtype=torch.float64)


def rows(scores: Tensor, count: int) -> Tensor:
    return scores.expand(count, -1).clone().requires_grad_()


def z_values(samples: Tensor, mean: Tensor | float = 0.0) -> Tensor:
    """How many standard errors the mean over the first dimension lies from ``mean``."""
    return (samples.mean(0) - mean) / (samples.std(0) / math.sqrt(len(samples)))


def normal_bound(comparisons: int) -> float:
    return float(stats.norm.isf(FALSE_ALARM / comparisons / 2))


# Gumbel noise given the choice


DRAWS = 60_000
SEEN = torch.tensor([True, True, True, False])


def perturbed_given(index: int, scale: float, sample: int, conditional: bool) -> Tensor:
    """S / c + G given the choice ``index`` for DRAWS rows (DRAWS, 4) of which the last key is masked."""
    where = ga.noise.Coordinates(torch.tensor(5), 1, 1, DRAWS, 4)
    choice = make_choice(0.7, True, "gumbel", scale, where, torch.float64, "gumbel_rao", 3)
    scores, row = estimators.row_of(SCORES.expand(1, 1, DRAWS, 4), SEEN.expand(1, 1, DRAWS, 4), choice, where)
    chosen = torch.full((1, 1, DRAWS, 1), index)
    noise = estimators.conditional_noise(scores, chosen, row, sample)
    if not conditional:
        noise = ga.noise.further_gumbel(sample, where)
    return (scores / scale + noise)[0, 0]


def rejection_sampler(index: int, scale: float) -> Tensor:
    """The same by drawing numpy's Gumbels until the largest is at ``index``, (at least DRAWS / 2, 3)."""
    draw = np.random.default_rng(7)
    drawn = SCORES[:3].numpy() / scale + draw.gumbel(size=(20 * DRAWS, 3))
    return torch.from_numpy(drawn[drawn.argmax(1) == index][:DRAWS])


FIGURES: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"key {j}": lambda x, j=j: x[:, j] for j in range(3)},
    "sum": lambda x: x.sum(1),
    "gap": lambda x: x.max(1).values - x.median(1).values,
}
"""What is compared: each key's marginal, and two that depend on how the keys vary together."""


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("index", [0, 1])
def test_noise_given_the_choice_is_that_of_a_rejection_sampler(index: int, scale: float) -> None:
    want = rejection_sampler(index, scale)
    assert len(want) >= DRAWS / 2
    bound = FALSE_ALARM / (2 * len(FIGURES))
    for sample in (1, 2):
        got = perturbed_given(index, scale, sample, True)[:, :3]
        assert (got.argmax(1) == index).all()
        free = perturbed_given(index, scale, sample, False)[:, :3]
        for name, figure in FIGURES.items():
            p = stats.ks_2samp(figure(got), figure(want)).pvalue
            assert p > bound, (sample, name, p)
            assert stats.ks_2samp(figure(free), figure(want)).pvalue < bound, name  # the control


def test_samples_given_the_choice_are_independent_of_each_other() -> None:
    """Rank correlation of each key between samples, and with the noise that made the choice."""
    where = ga.noise.Coordinates(torch.tensor(5), 1, 1, DRAWS, 4)
    main = (SCORES + ga.noise.sample("gumbel", where))[0, 0, :, :3]
    chosen = main.argmax(1) == 0
    drawn = [main[chosen], *(perturbed_given(0, 1.0, sample, True)[chosen, :3] for sample in (1, 2, 3))]
    pairs = list(itertools.combinations(range(4), 2))
    bound = FALSE_ALARM / (3 * len(pairs))
    for (i, j), key in itertools.product(pairs, range(3)):
        assert stats.spearmanr(drawn[i][:, key], drawn[j][:, key]).pvalue > bound, (i, j, key)
    shared = perturbed_given(0, 1.0, 1, True)[chosen, :3] + 0.05 * drawn[0]  # the control: 5 % of it in common
    assert stats.spearmanr(drawn[0][:, 1], shared[:, 1]).pvalue < bound


# Hard choices


ESTIMATORS = {
    "straight_through": {"tau": 0.3},
    "gumbel_rao": {"tau": 0.3, "samples": 2},
    "reinmax": {"tau": 2.0},
    "score_function": {"tau": 5.0},
}


def chi_square(observed: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * observed.sum()
    assert (expected > 5).all()
    return float(stats.chisquare(observed.numpy(), expected.numpy()).pvalue)


def ordered_pairs(scores: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """The ordered pairs of keys, and the probability of drawing them without replacement."""
    pairs, p = list(itertools.permutations(range(len(scores)), 2)), scores.softmax(-1)
    return pairs, torch.stack([p[i] * p[j] / (1.0 - p[i]) for i, j in pairs])


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_choices_follow_softmax_of_scores_by_noise_scale(name: str, scale: float) -> None:
    def observed(**settings: Any) -> Tensor:
        info = ga.gumbel_softmax_with_info(SCORES.expand(100_000, 4), hard=True, noise_scale=scale, seed=3, **settings)
        assert info.indices is not None
        assert torch.equal(info.weights.argmax(-1), info.indices)
        return torch.bincount(info.indices, minlength=4)

    p = (SCORES / scale).softmax(-1)
    assert chi_square(observed(estimator=name, **ESTIMATORS[name]), p) > FALSE_ALARM
    assert chi_square(observed(noise="normal"), p) < FALSE_ALARM  # the control


@pytest.mark.parametrize("name", ["straight_through", "score_function"])
def test_two_choices_follow_sampling_without_replacement(name: str) -> None:
    pairs, p = ordered_pairs(SCORES / 0.8)

    def observed(**settings: Any) -> Tensor:
        info = ga.gumbel_softmax_with_info(
            SCORES.expand(100_000, 4), 0.5, True, noise_scale=0.8, top_k=2, seed=3, **settings
        )
        assert info.indices is not None
        return torch.tensor([int((info.indices == torch.tensor(pair)).all(-1).sum()) for pair in pairs])

    assert chi_square(observed(estimator=name), p) > FALSE_ALARM
    assert chi_square(observed(noise="logistic"), p) < FALSE_ALARM  # the control


# The score function


SCALE = 0.7
COSTS = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)


def cost(weights: Tensor) -> Tensor:
    """A loss that is not linear in the weights, so that no relaxation has its gradient."""
    return ((weights * COSTS).sum(-1) - 0.4).square() + 0.5 * weights[..., 1]


def exact_gradient(top_k: int | None) -> Tensor:
    """Of the expected cost, by enumeration."""
    scores = SCORES.clone().requires_grad_()
    if top_k is None:
        expected = ((scores / SCALE).softmax(-1) * cost(torch.eye(4).double())).sum()
    else:
        pairs, p = ordered_pairs(scores / SCALE)
        expected = (p * cost(torch.stack([torch.eye(4).double()[list(pair)].mean(0) for pair in pairs]))).sum()
    return torch.autograd.grad(expected, scores)[0]


def score_function_gradients(
    top_k: int | None, log_prob: Callable[[Tensor, ga.SoftmaxInfo], Tensor | None], baseline: float = 0.0
) -> Tensor:
    """One estimate in each row, (100_000, 4)."""
    scores = rows(SCORES, 100_000)
    settings: dict[str, Any] = {"tau": 0.5, "hard": True, "noise_scale": SCALE, "seed": 9, "top_k": top_k}
    info = ga.gumbel_softmax_with_info(scores, estimator="score_function", **settings)
    chosen = log_prob(scores, info)
    assert chosen is not None
    loss = ga.score_function_loss(cost(info.weights), chosen, baseline)
    return torch.autograd.grad(loss * len(scores), scores)[0]


def noisy_log_prob(scores: Tensor, info: ga.SoftmaxInfo) -> Tensor:
    """The mistake: log P[idx], of weights that contain the noise."""
    assert info.indices is not None
    soft = ga.gumbel_softmax(scores, 0.5, noise_scale=SCALE, seed=9)
    return soft.gather(-1, info.indices[:, None]).log()[:, 0]


def with_replacement(scores: Tensor, info: ga.SoftmaxInfo) -> Tensor:
    """The mistake: the second key as if the first were still there."""
    assert info.indices is not None
    return (scores / SCALE).log_softmax(-1).gather(-1, info.indices).sum(-1)


@pytest.mark.parametrize(("top_k", "mistake"), [(None, noisy_log_prob), (2, with_replacement)])
@pytest.mark.parametrize("baseline", [0.0, 1.5])
def test_the_score_function_is_unbiased(
    top_k: int | None, mistake: Callable[[Tensor, ga.SoftmaxInfo], Tensor], baseline: float
) -> None:
    exact, bound = exact_gradient(top_k), normal_bound(4)
    ours = z_values(score_function_gradients(top_k, lambda _, info: info.log_prob, baseline), exact)
    assert ours.abs().max() < bound
    assert z_values(score_function_gradients(top_k, mistake, baseline), exact).abs().max() > bound  # the control


def test_straight_through_is_biased() -> None:
    """The control of the costs: what the score function passes tells a biased estimator."""
    scores = rows(SCORES, 100_000)
    weights = ga.gumbel_softmax(scores, 0.5, True, noise_scale=SCALE, seed=9)
    grads = torch.autograd.grad(cost(weights).sum(), scores)[0]
    assert z_values(grads, exact_gradient(None)).abs().max() > normal_bound(4)


def test_leave_one_out_is_unbiased_and_varies_less() -> None:
    count, samples = 40_000, 4
    scores = rows(SCORES, samples * count)
    info = ga.gumbel_softmax_with_info(scores, 1.0, True, noise_scale=SCALE, estimator="score_function", seed=2)
    assert info.log_prob is not None
    losses, log_prob = (x.reshape(samples, count) for x in (cost(info.weights), info.log_prob))

    def estimates(baseline: float | Tensor) -> Tensor:
        loss = ga.score_function_loss(losses, log_prob, baseline) * count
        (grads,) = torch.autograd.grad(loss, scores, retain_graph=True)
        return grads.reshape(samples, count, 4).sum(0)

    exact, bound = exact_gradient(None), normal_bound(4)
    ours = estimates(ga.leave_one_out(losses))
    assert z_values(ours, exact).abs().max() < bound
    assert ours.var(0).sum() < 0.8 * estimates(0.0).var(0).sum()  # 0.70 by enumeration
    with_itself = estimates(losses.mean(0, keepdim=True))  # the control: the baseline knows the choice
    assert z_values(with_itself, exact).abs().max() > bound


# Gumbel-Rao


def test_gumbel_rao_expects_what_straight_through_does_and_varies_less() -> None:
    """The paired difference has mean zero. The control is noise that did not make the choice in the backward pass."""
    count, tau = 100_000, 0.5
    scores = rows(SCORES, count)

    def gradients(**settings: Any) -> Tensor:
        weights = ga.gumbel_softmax(scores, tau, True, noise_scale=SCALE, seed=6, **settings)
        return torch.autograd.grad(cost(weights).sum(), scores)[0]

    straight, averaged = gradients(), gradients(estimator="gumbel_rao", samples=10)
    bound = normal_bound(4)
    assert z_values(averaged - straight).abs().max() < bound
    assert averaged.var(0).sum() < 0.9 * straight.var(0).sum()

    hard = ga.gumbel_softmax(scores, tau, True, noise_scale=SCALE, seed=6).detach().requires_grad_()
    (d_weights,) = torch.autograd.grad(cost(hard).sum(), hard)
    other = ga.gumbel_softmax(scores, tau, noise_scale=SCALE, seed=7)
    (unconditional,) = torch.autograd.grad(other, scores, d_weights)
    assert z_values(unconditional - straight).abs().max() > bound
