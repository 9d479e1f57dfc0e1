r"""How each estimator passes a gradient through a hard choice.

A row of scores S under noise G, with c = noise_scale:

    Z = (S + c G) / tau        P = softmax(Z)        y = onehot(argmax Z)

A soft choice weighs by P. A hard one weighs by y, which has no derivative: its estimator takes that of a *surrogate*,
another function of S. Whoever receives the gradient g of the weights sends J^T g to the scores, J the surrogate's
Jacobian, while the values see the weights themselves:

    ================  ==================================================  ==========================================
    estimator         surrogate                                           sends to S
    ================  ==================================================  ==========================================
    straight_through  P                                                   J(P)^T g
    gumbel_rao        mean over K of P_k = softmax((S + c G_k) / tau)     mean of J(P_k)^T g, each G_k made choice y
    reinmax           see there, with c = 1:                              (2 J((y + softmax(S / tau)) / 2)
                                                                          - J(softmax(S)) / 2)^T g
    score_function    none: log_prob is for the loss                      nothing
    noisy_gradient    P; the choice is y = onehot(argmax S)               J(P)^T g
    ================  ==================================================  ==========================================

with J(w) = diag(w) - w w^T, the softmax's Jacobian where its value is w; straight-through's and Gumbel-Rao's are
divided by tau.

All of them act on the *weights*. Straight-through on the output instead, ``O_hard - sg(P V) + P V``, sends the values
the gradient of P (a dV that differs by 58 % of its length in tests/test_gradients.py); here a value that was not
chosen gets none, as in the forward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import noise
from .choice import (
    Choice,
    Row,
    log_prob,
    log_weights,
    masked_softmax,
    noise_and_sinks,
    one_hot,
    pick,
    relaxed,
    row_of,
    without_sink,
)

Surrogate = Callable[[Tensor, Any, Any], Tensor]
"""Weights as a function of (scores, tau, noise_scale)."""


class Chosen(NamedTuple):
    """Weights (..., n) before dropout; for a hard choice the keys (..., k), -1 for none, and their log-probability."""

    weights: Tensor
    indices: Tensor | None
    log_prob: Tensor | None


def choose(scores: Tensor, visible: Tensor | None, choice: Choice, sinks: Tensor | None = None) -> Chosen:
    """Noise, temperature and the choice over the last dimension, differentiable in scores, tau and noise_scale.

    Args:
        scores: (B, H, Lq, Lk); invisible entries may hold anything.
        visible: bool, broadcasts against the scores; ``None`` where every key takes part.
        choice: temperature, noise, and what is chosen how.
        sinks: scores (B, H, Lq, 1) of a column that takes part but carries no value.
    """
    columns = scores.shape[-1]
    scores, row = row_of(scores, visible, choice, choice.where, sinks)
    tau, scale = choice.tau, choice.noise_scale
    if not choice.hard:
        return Chosen(relaxed(scores, tau, scale, row)[..., :columns], None, None)
    indices = pick(scores.detach(), row)
    weights = one_hot(indices, scores)
    weights = with_surrogate(weights, scores, tau, scale, lambda: surrogates(scores.detach(), indices, row))
    return Chosen(weights[..., :columns], without_sink(indices, columns), log_prob(scores, scale, indices, row))


def surrogates(scores: Tensor, indices: Tensor, row: Row) -> Iterator[Surrogate]:
    """The surrogate of the choice's estimator, as functions to be summed, each with the memory of one softmax.

    Args:
        scores: (..., n) at which the choice was made, detached.
        indices: (..., k), the choice.
        row: the rest of it.
    """
    return _SURROGATES[row.choice.estimator](scores, indices, row)


def straight_through(scores: Tensor, indices: Tensor, row: Row) -> Iterator[Surrogate]:
    """The relaxed choice itself (Bengio et al. 2013; with Gumbel noise Jang et al. 2017; of subsets Xie & Ermon 2019).

    The same noise in the forward and the backward pass; without noise it is the deterministic straight-through.
    """
    yield lambda s, tau, scale: relaxed(s, tau, scale, row)


def noisy_gradient(scores: Tensor, indices: Tensor, row: Row) -> Iterator[Surrogate]:
    """Straight-through whose noise is in the backward pass alone: the keys are those of the largest scores.

    For the question what noise does where: against straight-through with noise it differs in the forward pass only,
    against the deterministic one in the backward pass only. Not an estimator of the literature.
    """
    return straight_through(scores, indices, row)


def gumbel_rao(scores: Tensor, indices: Tensor, row: Row) -> Iterator[Surrogate]:
    r"""The mean of K relaxations whose noise all made this choice (Paulus et al. 2021, Rao-Blackwellised).

    The expectation of straight-through and less variance. The first of the K is the noise that was drawn, so that
    K = 1 is straight-through to the bit; the others are drawn given the choice i, with :math:`L = S / c` and fresh
    Gumbels :math:`G'` (Maddison et al. 2014):

    .. math:: T = \log \textstyle\sum_j e^{L_j} + G'_i, \qquad
              L_i + G_i = T, \quad L_j + G_j = -\log(e^{-(L_j + G'_j)} + e^{-T})

    The noise counts as a constant: the estimator averages Jacobians, it does not differentiate the conditional
    distribution. Public code forms exp(L) and divides by it, which gives NaN for masked keys and for large scores;
    here everything stays in logarithms.
    """
    count = row.choice.samples
    yield lambda s, tau, scale: relaxed(s, tau, scale, row) / count
    for sample in range(1, count):
        drawn = dataclasses.replace(row, noise=conditional_noise(scores, indices, row, sample))
        yield functools.partial(lambda given, s, tau, scale: relaxed(s, tau, scale, given) / count, drawn)


def conditional_noise(scores: Tensor, indices: Tensor, row: Row, sample: int) -> Tensor:
    """Gumbel noise given that it makes the choice ``indices`` (..., 1); ``sample`` >= 1 numbers independent draws."""
    assert row.where is not None
    draw = functools.partial(noise.further_gumbel, sample, row.where)
    fresh = noise_and_sinks(draw, row.sink).to(scores.dtype)
    logits = log_weights(scores, row.choice.noise_scale).detach()
    lowest = logits if row.visible is None else logits.masked_fill(~row.visible, torch.finfo(logits.dtype).min)
    chosen = indices.clamp(min=0)
    top = lowest.logsumexp(dim=-1, keepdim=True) + fresh.gather(-1, chosen)
    below = -torch.logaddexp(-(logits + fresh), -top)
    given = below.scatter(-1, chosen, top) - logits
    return given if row.visible is None else given.masked_fill(~row.visible, 0.0)


def reinmax(scores: Tensor, indices: Tensor, row: Row) -> Iterator[Surrogate]:
    r"""Second-order accurate (Liu et al. 2023): Heun's method where straight-through is Euler's.

    With :math:`\theta = S / c`, :math:`\pi = \mathrm{softmax}(\theta)`, and :math:`J(w)` the softmax's Jacobian at
    weights w:

    .. math:: 2 J\Big(\frac{y + \mathrm{softmax}(\theta / \tau)}{2}\Big) - \frac{1}{2} J(\pi)

    tau shapes only this gradient, the choice is a sample of :math:`\pi`; the authors allow tau >= 1. tau gets no
    gradient. Their package draws by torch.multinomial; here the choice is the library's Gumbel-max and masked keys
    have no share in any of the three distributions.
    """
    theta = log_weights(scores, row.choice.noise_scale)
    midpoint = (one_hot(indices, scores) + masked_softmax(theta / row.choice.tau, row.visible)).detach() / 2

    def surrogate(s: Tensor, tau: float | Tensor, scale: float | Tensor) -> Tensor:
        logits = log_weights(s, scale)
        centred = logits - (midpoint * logits).sum(dim=-1, keepdim=True)  # times midpoint: its Jacobian is J(midpoint)
        return 2 * midpoint * centred - masked_softmax(logits, row.visible) / 2

    yield surrogate


def score_function(scores: Tensor, indices: Tensor, row: Row) -> Iterator[Surrogate]:
    """Nothing: the weights are constants, and the loss uses ``log_prob`` (Williams 1992, REINFORCE).

    See :mod:`gumbel_attention.score_function` for that loss and its baselines. Unbiased at every setting.
    """
    return iter(())


_SURROGATES: dict[str, Callable[[Tensor, Tensor, Row], Iterator[Surrogate]]] = {
    "straight_through": straight_through,
    "gumbel_rao": gumbel_rao,
    "reinmax": reinmax,
    "score_function": score_function,
    "noisy_gradient": noisy_gradient,
}


def pull_back(
    functions: Iterable[Surrogate],
    scores: Tensor,
    tau: float | Tensor,
    noise_scale: float | Tensor,
    grad: Tensor,
) -> list[Tensor | None]:
    """What a gradient of the sum of ``functions`` sends to scores, tau and noise_scale; ``None`` for a number."""
    named = (scores, tau, noise_scale)
    tensors = [i for i, x in enumerate(named) if isinstance(x, Tensor)]
    totals: list[Tensor | None] = [torch.zeros_like(x) if isinstance(x, Tensor) else None for x in named]

    def of_tensors(function: Surrogate, *given: Tensor) -> Tensor:
        full: list[Any] = list(named)
        for i, x in zip(tensors, given, strict=True):
            full[i] = x
        return function(full[0], full[1], full[2])

    for function in functions:
        pulled: Any = torch.func.vjp(functools.partial(of_tensors, function), *(named[i] for i in tensors))
        for i, part in zip(tensors, pulled[1](grad), strict=True):
            total = totals[i]
            totals[i] = part if total is None else total + part
    return totals


class _WithSurrogate(torch.autograd.Function):
    """Forward ``hard``, exactly; backward the incoming gradient to ``hard`` itself and through the surrogates.

    ``hard + surrogate - surrogate.detach()`` has the same gradient but a rounded value, and turns inf into NaN.
    """

    @staticmethod
    def forward(ctx: Any, hard: Tensor, scores: Tensor, tau: Any, noise_scale: Any, functions: Any) -> Tensor:
        ctx.functions, ctx.numbers = functions, [None if isinstance(x, Tensor) else x for x in (tau, noise_scale)]
        ctx.save_for_backward(scores, *(x if isinstance(x, Tensor) else None for x in (tau, noise_scale)))
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "second derivatives of a hard choice are not defined here: its first one is an estimate, not the "
                "derivative of its value. Use hard=False, or leave out create_graph=True."
            )
        scores, *tensors = ctx.saved_tensors
        tau, scale = (n if x is None else x for n, x in zip(ctx.numbers, tensors, strict=True))
        return grad, *pull_back(ctx.functions(), scores, tau, scale, grad), None


def with_surrogate(
    hard: Tensor,
    scores: Tensor,
    tau: float | Tensor,
    noise_scale: float | Tensor,
    functions: Callable[[], Iterable[Surrogate]],
) -> Tensor:
    """The value of ``hard`` with the gradient of the functions' sum added to its own."""
    result: Tensor = _WithSurrogate.apply(hard, scores, tau, noise_scale, functions)
    return result
