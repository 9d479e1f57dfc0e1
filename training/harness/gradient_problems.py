"""Small attention problems whose expected loss, and its gradient, can be enumerated.

One row of attention with scores S picks one of n keys, D ~ Categorical(softmax(S)), and a loss f sees the value
picked. The gradient that every estimator estimates is that of

    F(S) = sum_i p_i f(v_i),    p = softmax(S)

Two stacked rows: the second row's scores are S2 + A v1, so they depend on the first row's output v1, and the loss
sees the second row's output. F is then a sum over n^2 outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
LOSSES = ("linear", "quadratic", "cubic", "mlp")
_DIM = 3
_HIDDEN = 8


@dataclass(frozen=True)
class Problem:
    """One or two rows of attention.

    Attributes:
        name: how the tables call it.
        scores: (rows, n), float64: the parameters whose gradient is asked for.
        values: (rows, n, d): what each row's keys carry.
        coupling: (n, d), A above; None for a single row.
        losses: by name; each takes (..., d) to (...).
        of_weights: the loss sees the weights themselves: values are the identity, and no attention is computed.
    """

    name: str
    scores: Tensor
    values: Tensor
    coupling: Tensor | None
    losses: dict[str, Loss]
    of_weights: bool = False

    @property
    def rows(self) -> int:
        """How many rows of attention are stacked."""
        return self.scores.shape[0]

    @property
    def keys(self) -> int:
        """How many keys each row chooses from."""
        return self.scores.shape[1]


def one_row(keys: int, seed: int, *, of_weights: bool = False) -> Problem:
    """One row of attention over ``keys`` keys with random scores, values and losses."""
    generator = torch.Generator().manual_seed(1000 * seed + 2 * keys + of_weights)
    scores = _normal(generator, 1, keys)
    values = torch.eye(keys, dtype=torch.float64)[None] if of_weights else _normal(generator, 1, keys, _DIM)
    name = f"one row, n={keys}" + (", loss of the weights" if of_weights else "")
    return Problem(name, scores, values, None, make_losses(values.shape[-1], generator), of_weights)


def two_rows(keys: int, seed: int) -> Problem:
    """Two stacked rows over ``keys`` keys each."""
    generator = torch.Generator().manual_seed(1000 * seed + 100 + keys)
    scores, values = _normal(generator, 2, keys), _normal(generator, 2, keys, _DIM)
    coupling = _normal(generator, keys, _DIM)
    return Problem(f"two rows, n={keys}", scores, values, coupling, make_losses(_DIM, generator))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_losses(dim: int, generator: torch.Generator) -> dict[str, Loss]:
    """A linear, a quadratic, a cubic loss and a small tanh network, of vectors of ``dim`` entries."""
    slope, target, cubic = (_normal(generator, dim) for _ in range(3))
    into, bias = 1.5 * _normal(generator, dim, _HIDDEN) / math.sqrt(dim), _normal(generator, _HIDDEN)
    out = _normal(generator, _HIDDEN)
    return {
        "linear": lambda x: x @ slope.to(x),
        "quadratic": lambda x: (x - target.to(x)).square().sum(-1),
        "cubic": lambda x: x.pow(3) @ cubic.to(x),
        "mlp": lambda x: torch.tanh(x @ into.to(x) + bias.to(x)) @ out.to(x),
    }


def expected_loss(problem: Problem, loss: Loss, scores: Tensor) -> Tensor:
    """F(scores) by enumeration of every outcome, differentiable in ``scores`` (rows, n)."""
    first = scores[0].softmax(-1)
    if problem.coupling is None:
        return first @ loss(problem.values[0])
    second = _second_scores(problem, scores).softmax(-1)
    return first @ second @ loss(problem.values[1])


def exact_gradient(problem: Problem, loss: Loss) -> Tensor:
    """The gradient of F at the problem's scores, (rows * n,), float64."""
    scores = problem.scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(expected_loss(problem, loss, scores), scores)
    return gradient.flatten()


def straight_through_limit(problem: Problem, loss: Loss) -> Tensor:
    r"""The expected straight-through gradient as tau -> 0, (rows * n,), in closed form.

    As tau -> 0 the Jacobian of softmax((S + G) / tau) is concentrated where two keys i, j tie for the first place,
    which happens with density p_i p_j; it then points along e_i - e_j, and the hard choice is either of them, each
    on its half of the tie. So the limit is

    .. math:: g_k = p_k \sum_j p_j \, \tfrac12 (f'(v_k) + f'(v_j)) \cdot (v_k - v_j)

    whereas the truth has f(v_k) - f(v_j) = \int_0^1 f'(v_j + s (v_k - v_j)) \cdot (v_k - v_j) ds in place of that
    trapezoid: the two agree where f' is linear between any two values, so for linear and quadratic losses. The same
    sum is what ReinMax expects at tau = 1 (Liu et al. 2023, arXiv:2304.08612, their second-order approximation).

    Stacked rows: noise of the second row is independent of the tie in the first, so that the sum above applies to the
    second row given the first's choice, and to the first with the gradient that the second hands down as its f'.
    That gradient is not linear between two values even for a linear loss.
    """
    last = problem.values[-1].clone().requires_grad_()
    (slopes,) = torch.autograd.grad(loss(last).sum(), last)
    first = problem.scores[0].softmax(-1)
    if problem.coupling is None:
        return _tie_sum(first, slopes, problem.values[0])
    second = _second_scores(problem, problem.scores).softmax(-1)
    handed_down = torch.stack([_tie_sum(row, slopes, problem.values[1]) for row in second])
    return torch.cat([_tie_sum(first, handed_down @ problem.coupling, problem.values[0]), first @ handed_down])


def pair_expectation(problem: Problem, loss: Loss, tau: float, *, hard: bool) -> Tensor:
    r"""The expected gradient of the relaxation, or of straight-through, for one row of two keys: (2,), by quadrature.

    With u = P_1 = sigmoid((S_1 - S_2 + G_1 - G_2) / tau) the Jacobian of the softmax cancels against du / dG, and

    .. math:: g_1 = -g_2 = \int_0^1 \rho(\tau\,\mathrm{logit}(u) - S_1 + S_2)\, f'(w(u)) \cdot (v_1 - v_2)\, du

    where rho is the logistic density and w(u) is u v_1 + (1 - u) v_2 for the relaxation, and the nearer of v_1, v_2
    for straight-through. As tau -> 0 the density becomes the constant p_1 p_2: the relaxation integrates f' along the
    edge, which gives the truth; straight-through gives the trapezoid of :func:`straight_through_limit`.
    """
    if problem.rows != 1 or problem.keys != 2:
        raise ValueError(f"expected one row of two keys, got {problem.rows} of {problem.keys}.")
    u, weight = _halves_of_unit_interval()
    values = problem.values[0]
    share = (u > 0.5).double() if hard else u
    at = (share * values[0] + (1 - share) * values[1]).requires_grad_()
    (slopes,) = torch.autograd.grad(loss(at).sum(), at)
    gap = tau * torch.logit(u[:, 0]) - problem.scores[0, 0] + problem.scores[0, 1]
    density = torch.sigmoid(gap) * torch.sigmoid(-gap)
    first = (weight * density * (slopes @ (values[0] - values[1]))).sum()
    return torch.stack([first, -first])


def score_variance(problem: Problem, loss: Loss, baseline: float = 0.0) -> float:
    """Total variance of one score-function gradient with a constant baseline, by enumeration."""
    weights, losses, scores = _outcomes(problem, loss)
    estimates = (losses - baseline)[:, None] * scores
    mean = weights @ estimates
    return float(weights @ (estimates - mean).square().sum(-1))


def leave_one_out_variance(problem: Problem, loss: Loss, samples: int) -> float:
    """Total variance of one score-function gradient from K choices with the leave-one-out baseline, by enumeration.

    It is a U-statistic of order two with the kernel h(x, y) = (f(x) - f(y)) (s(x) - s(y)) / 2, s the gradient of the
    log-probability, whose variance is 2 / (K (K - 1)) (2 (K - 2) Var E[h | x] + Var h) (Hoeffding 1948).
    """
    weights, losses, scores = _outcomes(problem, loss)
    kernel = (losses[:, None] - losses[None])[..., None] * (scores[:, None] - scores[None]) / 2
    given_one = torch.einsum("j,ijd->id", weights, kernel)
    mean = weights @ given_one
    of_one = weights @ (given_one - mean).square().sum(-1)
    of_both = weights @ (kernel - mean).square().sum(-1) @ weights
    return float(2 / (samples * (samples - 1)) * (2 * (samples - 2) * of_one + of_both))


def loss_spread(problem: Problem, loss: Loss) -> float:
    """Standard deviation of the loss over the outcomes."""
    weights, losses, _ = _outcomes(problem, loss)
    return float((weights @ (losses - weights @ losses).square()).sqrt())


def _outcomes(problem: Problem, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Probability, loss and gradient of the log-probability (rows * n,) of every outcome."""
    eye = torch.eye(problem.keys, dtype=torch.float64)
    first = problem.scores[0].softmax(-1)
    if problem.coupling is None:
        return first, loss(problem.values[0]), eye - first
    second = _second_scores(problem, problem.scores).softmax(-1)
    own = (eye - first)[:, None].expand(-1, problem.keys, -1)
    scores = torch.cat([own, eye[None] - second[:, None]], dim=-1)
    losses = loss(problem.values[1]).expand(problem.keys, -1)
    return (first[:, None] * second).flatten(), losses.flatten(), scores.flatten(0, 1)


@cache
def _halves_of_unit_interval() -> tuple[Tensor, Tensor]:
    """Nodes (m, 1) and weights (m,) of Gauss-Legendre quadrature on (0, 1/2) and (1/2, 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    half = torch.from_numpy(nodes + 1) / 4
    return torch.cat([half, half + 0.5])[:, None], torch.from_numpy(np.tile(weights / 4, 2))


def _second_scores(problem: Problem, scores: Tensor) -> Tensor:
    """Scores of the second row for each choice of the first, (choice, n)."""
    assert problem.coupling is not None
    return scores[1] + problem.values[0] @ problem.coupling.T


def _tie_sum(probabilities: Tensor, slopes: Tensor, values: Tensor) -> Tensor:
    """The sum over ties in :func:`straight_through_limit`: (n,) from (n,), (n, d), (n, d)."""
    steps = values[:, None] - values[None]
    heights = 0.5 * ((slopes[:, None] + slopes[None]) * steps).sum(-1)
    return probabilities * (heights @ probabilities)
