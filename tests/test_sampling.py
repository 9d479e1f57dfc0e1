"""Frequencies: Gumbel-max samples Categorical(softmax(scores / noise_scale)), in every dtype, whatever tau is.

No other noise does: the other families' frequencies are those of their own choice probabilities, by integration.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import gumbel_attention as ga
from noise_figures import FAMILIES, choice_probabilities, total_variation

FALSE_ALARM = 1e-4
"""Of each chi-square test, on a fresh seed; the seeds are fixed, so a pass stays a pass."""

ROWS = 200_000
SCORES = {
    "uniform": [0.0] * 8,
    "one favourite": [8.0] + [0.0] * 63,
    "ramp": [0.25 * i for i in range(12)],
    "two equal, far apart": [3.0] + [-1.0] * 30 + [3.0],
    "negative and large": [-50.0, -49.0, -48.0, -52.0],
    "random": torch.randn(40, generator=torch.Generator().manual_seed(1)).tolist(),
}


def counts(scores: Tensor, noise: str = "gumbel", **settings: object) -> Tensor:
    """How often each key is chosen over ROWS queries with these scores."""
    n = scores.numel()
    eye = torch.eye(n, dtype=scores.dtype)[None, None]
    query = scores.expand(1, 1, ROWS, n)
    total = torch.zeros(n, dtype=torch.int64)
    for seed, part in enumerate(query.split(20_000, dim=2)):
        info = ga.gumbel_attention_with_info(
            part, eye, eye[..., :1], scale=1.0, hard=True, noise=noise, seed=seed, **settings
        )
        assert info.indices is not None
        total += torch.bincount(info.indices.flatten(), minlength=n)
    return total


def p_value(observed: Tensor, scores: Tensor) -> float:
    """Of the chi-square test against softmax(scores)."""
    return chi_square(observed, scores.double().softmax(-1))


def chi_square(observed: Tensor, probabilities: Tensor) -> float:
    """The p-value of the frequencies; cells that expect fewer than 5 are pooled."""
    expected = probabilities * ROWS
    small = expected < 5
    cells = [
        torch.cat([x[~small].double(), x[small].sum().double()[None]] if small.any() else [x.double()])
        for x in (observed, expected)
    ]
    return float(stats.chisquare(cells[0].numpy(), cells[1].numpy()).pvalue)


@pytest.mark.parametrize("name", SCORES)
def test_gumbel_max_frequencies_pass_chi_square(name: str) -> None:
    scores = torch.tensor(SCORES[name])
    assert p_value(counts(scores), scores) > FALSE_ALARM


@pytest.mark.parametrize(("tau", "noise_scale"), [(0.1, 1.0), (7.0, 1.0), (1.0, 0.5), (2.0, 3.0)])
def test_only_noise_scale_changes_the_distribution(tau: float, noise_scale: float) -> None:
    scores = torch.tensor(SCORES["ramp"])
    observed = counts(scores, tau=tau, noise_scale=noise_scale)
    assert p_value(observed, scores / noise_scale) > FALSE_ALARM


def test_normal_noise_of_the_same_variance_does_not_pass() -> None:
    """The control: the test tells another distribution from the right one."""
    scores = torch.tensor(SCORES["ramp"])
    assert p_value(counts(scores, noise="normal"), scores) < FALSE_ALARM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_top_class_has_its_probability_in_every_dtype(dtype: torch.dtype) -> None:
    """exp(8) / (exp(8) + 63) = 0.9793; torch.distributions.Gumbel in bfloat16 gives 0.9987."""
    scores = torch.tensor(SCORES["one favourite"], dtype=dtype)
    top = int(counts(scores)[0])
    p = 0.979305
    assert stats.binomtest(top, ROWS, p).pvalue > FALSE_ALARM
    assert stats.binomtest(top, ROWS, 0.9987).pvalue < FALSE_ALARM  # the control


def test_gumbel_softmax_in_half_precision() -> None:
    logits = torch.tensor(SCORES["one favourite"]).bfloat16().expand(ROWS // 4, 64)
    top = int(ga.gumbel_softmax(logits, hard=True, seed=1)[:, 0].sum(dtype=torch.float64))
    assert stats.binomtest(top, ROWS // 4, 0.979305).pvalue > FALSE_ALARM
    half = torch.distributions.Gumbel(torch.zeros((), dtype=torch.bfloat16), 1.0)
    control = int(((logits + half.sample(logits.shape)).argmax(-1) == 0).sum())
    assert stats.binomtest(control, ROWS // 4, 0.979305).pvalue < FALSE_ALARM


CHOICES = {
    "two": [0.7, -0.7],
    "one favourite": [3.0] + [0.0] * 15,
    "ramp": SCORES["ramp"],
    "pairs": [2.0, 2.0, 0.0, 0.0, -1.0],
}
FAMILY_ALARM = 1e-6 / (len(FAMILIES) * len(CHOICES))
"""Of each test of a family's frequencies; of all of them together it is 1e-6."""
DISTANCE = {  # total variation between the choice and softmax(scores), by a trapezoid rule apart from the script's
    "normal": {"two": 0.022282, "one favourite": 0.131556, "ramp": 0.088956, "pairs": 0.040355},
    "logistic": {"two": 0.009984, "one favourite": 0.120613, "ramp": 0.073099, "pairs": 0.041746},
}


def probabilities_of(family: str, name: str) -> Tensor:
    return torch.from_numpy(choice_probabilities(family, CHOICES[name]))


@pytest.mark.parametrize("name", CHOICES)
def test_only_the_choice_by_gumbel_noise_is_softmax(name: str) -> None:
    softmax = np.exp(CHOICES[name]) / np.exp(CHOICES[name]).sum()
    distance = {family: total_variation(choice_probabilities(family, CHOICES[name]), softmax) for family in FAMILIES}
    assert distance["gumbel"] < 1e-8
    for family, known in DISTANCE.items():
        assert distance[family] == pytest.approx(known[name], abs=1e-6)


def test_the_integral_is_that_of_the_difference_of_two_normals() -> None:
    difference = stats.norm(scale=np.pi / np.sqrt(6) * np.sqrt(2))
    expected = [difference.cdf(1.4), difference.cdf(-1.4)]
    np.testing.assert_allclose(choice_probabilities("normal", CHOICES["two"]), expected, rtol=1e-12)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_chooses_with_the_probabilities_of_its_integral(family: str, name: str) -> None:
    observed = counts(torch.tensor(CHOICES[name]), noise=family)
    assert chi_square(observed, probabilities_of(family, name)) > FAMILY_ALARM
    for other in set(FAMILIES) - {family}:  # the control: another family's integral does not fit
        assert chi_square(observed, probabilities_of(other, name)) < FAMILY_ALARM
