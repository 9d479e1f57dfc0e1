r"""From scores to weights, and how each estimator passes a gradient through a hard choice.

A row of scores S under noise G, with c = noise_scale:

    Z = (S + c G) / tau        P = softmax(Z)        y = onehot(argmax Z)

A soft choice weighs by P. A hard one weighs by y, which has no derivative: its estimator takes that of a *surrogate*,
another function of S. Whoever receives the gradient g of the weights sends J^T g to the scores, J the surrogate's
Jacobian, while the values see the weights themselves:

    =================  =====================================================  ============================
    estimator          surrogate                                              sends to S
    =================  =====================================================  ============================
    straight_through   P                                                      J_P^T g
    gumbel_rao         mean over K of softmax((S + c G_k) / tau), G_k | y      mean of J_k^T g
    reinmax            2 softmax at (y + softmax(S/c/tau)) / 2 - P_1 / 2      (2 J_1/2 - J_P1 / 2)^T g
    score_function     none: log_prob is for the loss                         nothing
    =================  =====================================================  ============================

All of them act on the *weights*. Straight-through on the output instead, ``O_hard - sg(P V) + P V``, sends the values
the gradient of P (a dV that differs by 58 % of its length in tests/test_gradients.py); here a value that was not
chosen gets none, as in the forward pass.

Every function here takes scores (..., n) in float32 or float64, in which masked entries may hold any finite number,
and gives masked keys exactly 0, as weight and as gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import noise
from .noise import Coordinates

SMALLEST_SCALE = 1e-6
"""A noise_scale below this counts as this where scores are divided by it."""

Surrogate = Callable[[Tensor, Any, Any], Tensor]
"""Weights as a function of (scores, tau, noise_scale)."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """How scores become weights: the arguments that attention and ``gumbel_softmax`` share.

    ``tau`` and ``noise_scale`` are floats or tensors that broadcast against (batch, heads, q_len, k_len).
    ``noise`` is ``"none"`` where no noise is to be added. ``where`` is ``None`` where nothing is to be drawn.
    ``estimator`` counts where the choice is hard, ``samples`` for ``"gumbel_rao"``; ``top_k=None`` is the choice of
    one key whose indices have no dimension for it.
    """

    tau: float | Tensor
    hard: bool
    noise: str
    noise_scale: float | Tensor
    where: Coordinates | None
    estimator: str = "straight_through"
    samples: int = 1
    top_k: int | None = None

    @property
    def only_straight_through(self) -> bool:
        """Whether it is the choice of one key with the straight-through gradient, or none."""
        return self.top_k is None and (not self.hard or self.estimator == "straight_through")


@dataclasses.dataclass(frozen=True)
class Row:
    """All that a choice depends on beside the scores, tau and noise_scale.

    Attributes:
        choice: what is chosen how.
        visible: bool, broadcasts against the scores; ``None`` where every key takes part.
        noise: G of the scores' shape; ``None`` where there is none.
        where: the coordinates of the noise.
        sink: whether the last column is a sink's.
    """

    choice: Choice
    visible: Tensor | None
    noise: Tensor | None
    where: Coordinates | None
    sink: bool = False

    @property
    def picks(self) -> int:
        """How many keys are chosen."""
        return self.choice.top_k or 1

    def available(self, like: Tensor) -> Tensor:
        """How many keys a row chooses, (..., 1): ``picks``, or those that take part where they are fewer."""
        visible = torch.ones_like(like, dtype=torch.bool) if self.visible is None else self.visible
        return visible.sum(dim=-1, keepdim=True).clamp(max=self.picks)


class Chosen(NamedTuple):
    """Weights (..., n) before dropout; for a hard choice the keys (..., k), -1 for none, and their log-probability."""

    weights: Tensor
    indices: Tensor | None
    log_prob: Tensor | None


def row_of(
    scores: Tensor, visible: Tensor | None, choice: Choice, where: Coordinates | None, sinks: Tensor | None = None
) -> tuple[Tensor, Row]:
    """Scores and the rest of the choice, with the sinks' column (B, H, Lq, 1) appended to both where there is one."""
    sampled = None
    if sinks is not None:
        column = torch.ones_like(sinks, dtype=torch.bool)
        visible = None if visible is None else torch.cat([visible.expand_as(scores), column], dim=-1)
    if choice.noise != "none":
        assert where is not None
        sampled = _with_sink(functools.partial(noise.sample, choice.noise, where), sinks is not None).to(scores.dtype)
    if sinks is not None:
        scores = torch.cat([scores, sinks], dim=-1)
    if visible is not None:
        scores = scores.masked_fill(~visible, 0.0)
    return scores, Row(choice, visible, sampled, where, sinks is not None)


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
    weights = one_hot(indices, scores, row)
    weights = with_surrogate(weights, scores, tau, scale, lambda: surrogates(scores.detach(), indices, row))
    return Chosen(weights[..., :columns], without_sink(indices, columns), log_prob(scores, scale, indices, row))


def masked_softmax(z: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the visible keys. Invisible ones get exactly 0, and so does a row that sees none."""
    if visible is None:
        return torch.softmax(z, dim=-1)
    lowest = z.masked_fill(~visible, torch.finfo(z.dtype).min)
    return torch.softmax(lowest, dim=-1).masked_fill(~visible, 0.0)


def relaxed(scores: Tensor, tau: float | Tensor, noise_scale: float | Tensor, row: Row) -> Tensor:
    r"""The relaxed choice (Jang et al. 2017, Maddison et al. 2017): softmax((S + c G) / tau).

    With ``top_k`` the relaxed subset of Xie & Ermon (2019), after Plotz & Roth (2018), divided by its size so that a
    row sums to 1. With :math:`\alpha^1 = S + c\,G`:

    .. math:: p^i = \mathrm{softmax}(\alpha^i / \tau), \quad \alpha^{i+1} = \alpha^i + \log(1 - p^i), \quad
              \sum_{i \le k} p^i / k

    Their code clips 1 - p at the smallest float, which lets a key far above the others be taken twice; here
    log(1 - p) keeps its value.
    """
    logits = scores if row.noise is None else scores + noise_scale * row.noise
    if row.choice.top_k is None:
        return masked_softmax(logits / tau, row.visible)
    available = row.available(scores)
    total = torch.zeros_like(scores)
    for taken in range(min(row.picks, scores.shape[-1])):
        z = logits / tau
        p = masked_softmax(z, row.visible)
        total = total + torch.where(taken < available, p, 0.0)
        logits = logits + torch.where(taken + 1 < available, _log_of_rest(z, p, row.visible), 0.0)
    return total / available.clamp(min=1)


def pick(scores: Tensor, row: Row) -> Tensor:
    """The keys of largest Z, (..., k) int64, the best first, the lowest of equal ones; -1 where no key is left."""
    choice = row.choice
    z = (scores if row.noise is None else scores + choice.noise_scale * row.noise) / choice.tau
    if row.visible is not None:
        z = z.masked_fill(~row.visible, -torch.inf)
    z = z.detach()
    if row.picks == 1:
        indices = z.argmax(dim=-1, keepdim=True)
    else:
        indices = z.sort(dim=-1, descending=True, stable=True).indices[..., : row.picks]
    if row.visible is not None or row.picks > 1:
        order = torch.arange(indices.shape[-1], device=z.device)
        indices = indices.masked_fill(order >= row.available(scores), -1)
    return torch.nn.functional.pad(indices, (0, row.picks - indices.shape[-1]), value=-1)


def one_hot(indices: Tensor, like: Tensor, row: Row) -> Tensor:
    """Equal weights, 1 in all, on the keys chosen; zeros where there are none."""
    chosen = indices >= 0
    share = chosen.to(like.dtype) / chosen.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.zeros_like(like).scatter_add(-1, indices.clamp(min=0), share)


def log_prob(scores: Tensor, noise_scale: float | Tensor, indices: Tensor, row: Row) -> Tensor | None:
    r"""log softmax(S / c)[idx]: the probability of the choice, (...); ``None`` unless the noise is Gumbel's.

    argmax((S + c G) / tau) is a sample of softmax(S / c) whatever tau is. (log P[idx] is not its log-probability: it
    contains the noise.) Of k keys it is that of drawing them in this order without replacement (Kool et al. 2019),

    .. math:: \sum_i \log \frac{\exp(S_{idx_i} / c)}{\sum_{j \notin \{idx_1 \dots idx_{i-1}\}} \exp(S_j / c)}

    A row without keys gives 0.
    """
    if row.choice.noise != "gumbel":
        return None
    logits = _log_weights(scores, noise_scale)
    left = torch.ones_like(scores, dtype=torch.bool) if row.visible is None else row.visible.expand_as(scores)
    total = torch.zeros_like(scores[..., 0])
    columns = torch.arange(scores.shape[-1], device=scores.device)
    for place, index in enumerate(indices.split(1, dim=-1)):
        if place > 0:
            left = left & (columns != indices[..., place - 1, None])
        lowest = logits.masked_fill(~left, torch.finfo(logits.dtype).min)
        chosen = lowest.log_softmax(dim=-1).gather(-1, index.clamp(min=0))
        total = total + chosen.masked_fill(index < 0, 0.0).squeeze(-1)
    return total


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
    fresh = _with_sink(draw, row.sink).to(scores.dtype)
    logits = _log_weights(scores, row.choice.noise_scale).detach()
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
    theta = _log_weights(scores, row.choice.noise_scale)
    midpoint = (one_hot(indices, scores, row) + masked_softmax(theta / row.choice.tau, row.visible)).detach() / 2

    def surrogate(s: Tensor, tau: float | Tensor, scale: float | Tensor) -> Tensor:
        logits = _log_weights(s, scale)
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


def without_sink(indices: Tensor, columns: int) -> Tensor:
    """Indices with -1 for a column after the keys."""
    return indices.masked_fill(indices >= columns, -1)


def _with_sink(draw: Callable[..., Tensor], sink: bool) -> Tensor:
    """Noise of the scores, and after it that of the sink's column."""
    return torch.cat([draw(), draw(sink=True)], dim=-1) if sink else draw()


def _log_weights(scores: Tensor, noise_scale: float | Tensor) -> Tensor:
    """S / c, the logits of the distribution that Gumbel noise samples."""
    if isinstance(noise_scale, Tensor):
        return scores / noise_scale.clamp(min=SMALLEST_SCALE)
    return scores / max(noise_scale, SMALLEST_SCALE)


def _log_of_rest(z: Tensor, p: Tensor, visible: Tensor | None) -> Tensor:
    """log(1 - p) for p = softmax(z), exact where p rounds to 1; 0 for the only visible key.

    Only the largest p may be above 1/2; its rest is the sum over all other keys.
    """
    lowest = z if visible is None else z.masked_fill(~visible, torch.finfo(z.dtype).min)
    top = torch.zeros_like(p, dtype=torch.bool).scatter(-1, lowest.argmax(dim=-1, keepdim=True), True)
    others = lowest.masked_fill(top, torch.finfo(z.dtype).min)
    alone = others.amax(dim=-1, keepdim=True) <= torch.finfo(z.dtype).min
    others = others.masked_fill(alone, 0.0)
    of_top = others.logsumexp(dim=-1, keepdim=True) - lowest.logsumexp(dim=-1, keepdim=True)
    rest = torch.where(top, of_top, torch.log1p(-p.masked_fill(top, 0.0)))
    return torch.where(alone, 0.0, rest)
