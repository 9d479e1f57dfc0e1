"""From scores to a choice: noise and temperature, the keys picked and their probability.

A row of scores S under noise G, with c = noise_scale: Z = (S + c G) / tau. A soft choice weighs by softmax(Z), a hard
one by the one-hot of argmax Z, or equally by the k largest. Every function here takes scores (..., n) in float32 or
float64, in which masked entries may hold any finite number, and gives masked keys exactly 0, as weight and as
gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import noise
from .noise import Coordinates

SMALLEST_SCALE = 1e-6
"""A noise_scale below this counts as this where scores are divided by it."""


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

    @property
    def picks_with_noise(self) -> bool:
        """Whether noise decides which keys are picked."""
        return self.noise != "none" and self.estimator != "noisy_gradient"

    @property
    def samples_softmax(self) -> bool:
        """Whether it is a hard choice that is a sample of softmax(scores / noise_scale)."""
        return self.hard and self.noise == "gumbel" and self.picks_with_noise


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
        sampled = noise_and_sinks(functools.partial(noise.sample, choice.noise, where), sinks is not None).to(
            scores.dtype
        )
    if sinks is not None:
        scores = torch.cat([scores, sinks], dim=-1)
    if visible is not None:
        scores = scores.masked_fill(~visible, 0.0)
    return scores, Row(choice, visible, sampled, where, sinks is not None)


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
    g = row.noise if choice.picks_with_noise else None
    z = (scores if g is None else scores + choice.noise_scale * g) / choice.tau
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


def one_hot(indices: Tensor, like: Tensor) -> Tensor:
    """Equal weights, 1 in all, on the keys chosen; zeros where there are none."""
    return torch.zeros_like(like).scatter_add(-1, indices.clamp(min=0), shares(indices, like.dtype))


def shares(indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of each key chosen, (..., k): equal ones, 1 in all; 0 for none."""
    chosen = indices >= 0
    return chosen.to(dtype) / chosen.sum(dim=-1, keepdim=True).clamp(min=1)


def log_prob(scores: Tensor, noise_scale: float | Tensor, indices: Tensor, row: Row) -> Tensor | None:
    r"""log softmax(S / c)[idx]: the probability of the choice, (...); ``None`` unless Gumbel noise makes it.

    argmax((S + c G) / tau) is a sample of softmax(S / c) whatever tau is. (log P[idx] is not its log-probability: it
    contains the noise.) Of k keys it is that of drawing them in this order without replacement (Kool et al. 2019),

    .. math:: \sum_i \log \frac{\exp(S_{idx_i} / c)}{\sum_{j \notin \{idx_1 \dots idx_{i-1}\}} \exp(S_j / c)}

    A row without keys gives 0.
    """
    if not row.choice.samples_softmax:
        return None
    logits = log_weights(scores, noise_scale)
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


def without_sink(indices: Tensor, columns: int) -> Tensor:
    """Indices with -1 for a column after the keys."""
    return indices.masked_fill(indices >= columns, -1)


def noise_and_sinks(draw: Callable[..., Tensor], sink: bool) -> Tensor:
    """Noise of the scores, and after it that of the sink's column."""
    return torch.cat([draw(), draw(sink=True)], dim=-1) if sink else draw()


def log_weights(scores: Tensor, noise_scale: float | Tensor) -> Tensor:
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
