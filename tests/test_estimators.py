"""Estimators' gradients against the papers' formulas, written out here key by key in float64.

A row here holds the keys that take part and no others, so that a mask is tested against their absence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gumbel_attention as ga
from gumbel_attention.arguments import attention_problem
from gumbel_attention.impl import blockwise
from gumbel_attention.impl.problem import AttentionInfo

BATCH, HEADS, QUERIES, KEYS, DIM = 2, 2, 3, 5, 2
SEED = 11
TWO_QUERIES = 2 * BATCH * HEADS * KEYS
"""Scores of a block of two queries: the third stands in a block of its own."""


class Row(NamedTuple):
    """The scores of a row's keys, what is added to them, and the keys chosen, the best first."""

    s: Tensor
    gumbels: list[Tensor]
    tau: Tensor
    c: Tensor
    chosen: list[int]
    picks: int

    @property
    def hot(self) -> Tensor:
        weights = torch.zeros_like(self.s)
        weights[self.chosen] = 1.0 / len(self.chosen)
        return weights


def softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum()


def relaxed(row: Row, g: Tensor | None = None) -> Tensor:
    """Maddison et al. 2017, Jang et al. 2017; several keys: Xie & Ermon 2019."""
    alpha, total = row.s + row.c * (row.gumbels[0] if g is None else g), torch.zeros_like(row.s)
    for _ in range(len(row.chosen) - 1):
        p = softmax(alpha / row.tau)
        total, alpha = total + p, alpha + (1.0 - p).log()
    return (total + softmax(alpha / row.tau)) / len(row.chosen)


def given_choice(row: Row, fresh: Tensor) -> Tensor:
    """Paulus et al. 2021, equation 6, from exponentials E = exp(-G): the noise given the choice."""
    exponentials, rates = (-fresh).exp(), (row.s / row.c).exp()
    i = row.chosen[0]
    first = exponentials[i] / rates.sum()
    perturbed = [-(first if j == i else exponentials[j] / rates[j] + first).log() for j in range(len(rates))]
    return (torch.stack(perturbed) - rates.log()).detach()


def gumbel_rao(row: Row) -> Tensor:
    drawn = [row.gumbels[0], *(given_choice(row, fresh) for fresh in row.gumbels[1:])]
    return torch.stack([relaxed(row, g) for g in drawn]).mean(0)


def reinmax(row: Row) -> Tensor:
    """Liu et al. 2023, algorithm 2, as a function whose derivative automatic differentiation finds."""
    theta = row.s / row.c
    midpoint = (row.hot + softmax(theta / row.tau)) / 2
    shifted = ((midpoint.log() - theta).detach() + theta).softmax(0)
    return 2 * shifted - softmax(theta) / 2


def nothing(row: Row) -> Tensor:
    return torch.zeros_like(row.s)


def log_prob(row: Row) -> Tensor:
    """Of keys drawn one after the other without replacement: Plackett & Luce."""
    rates, left, total = (row.s / row.c).exp(), list(range(len(row.s))), torch.zeros((), dtype=torch.float64)
    for i in row.chosen:
        total = total + (rates[i] / rates[left].sum()).log()
        left.remove(i)
    return total


class Case(NamedTuple):
    settings: dict[str, Any]
    surrogate: Callable[[Row], Tensor]
    wrong: Callable[[Row], Tensor] | None
    """A plausible mistake, which must not pass for the right gradient."""


def unconditional(row: Row) -> Tensor:
    return torch.stack([relaxed(row, g) for g in row.gumbels]).mean(0)


def euler(row: Row) -> Tensor:
    return softmax(row.s / row.c / row.tau)


def without_removal(row: Row) -> Tensor:
    return softmax((row.s + row.c * row.gumbels[0]) / row.tau)


HARD: dict[str, Any] = {"hard": True}
CASES = {
    "straight_through": Case(HARD, relaxed, euler),
    "normal": Case(HARD | {"noise": "normal"}, relaxed, euler),
    "deterministic": Case(HARD | {"noise": "none"}, relaxed, nothing),
    "gumbel_rao, K=1": Case(HARD | {"estimator": "gumbel_rao", "samples": 1}, relaxed, euler),
    "gumbel_rao, K=5": Case(HARD | {"estimator": "gumbel_rao", "samples": 5}, gumbel_rao, unconditional),
    "reinmax": Case(HARD | {"estimator": "reinmax"}, reinmax, euler),
    "score_function": Case(HARD | {"estimator": "score_function"}, nothing, relaxed),
    "noisy_gradient": Case(HARD | {"estimator": "noisy_gradient"}, relaxed, euler),
    "two keys, soft": Case({"top_k": 2}, relaxed, without_removal),
    "two keys": Case(HARD | {"top_k": 2}, relaxed, without_removal),
    "three keys without noise": Case(HARD | {"top_k": 3, "noise": "none"}, relaxed, without_removal),
    "two keys, score_function": Case(HARD | {"top_k": 2, "estimator": "score_function"}, nothing, relaxed),
}
WITHOUT_NOISE = ("deterministic", "three keys without noise")
NOT_SAMPLED = (*WITHOUT_NOISE, "normal", "noisy_gradient")  # by softmax(scores / noise_scale)


def noise_of(case: Case, shape: tuple[int, ...], seed: int, sink: bool) -> list[Tensor]:
    """The noise that was drawn and, after it, the fresh Gumbels of the samples given the choice."""
    where = ga.noise.Coordinates(torch.tensor(seed), *shape)
    family, more = case.settings.get("noise", "gumbel"), case.settings.get("samples", 1)

    def column(draw: Callable[..., Tensor]) -> Tensor:
        return torch.cat([draw(), draw(sink=True)], -1) if sink else draw()

    if family == "none":
        return [torch.zeros(*shape[:3], shape[3] + sink, dtype=torch.float64)]
    main = column(lambda **kw: ga.noise.sample(family, where, **kw))
    return [main, *(column(lambda n=n, **kw: ga.noise.further_gumbel(n, where, **kw)) for n in range(1, more))]


def by_hand(
    case: Case, scores: Tensor, keep: Tensor, tau: Tensor, c: Tensor, seed: int = SEED, sink: bool = False
) -> tuple[Tensor, Tensor]:
    """Weights and log-probabilities of scores (B, H, Q, N), a row at a time; a sink is the last column."""
    batch, heads, queries, columns = scores.shape
    drawn = noise_of(case, (batch, heads, queries, columns - sink), seed, sink)
    main = noise_of(case, (batch, heads, queries, columns - sink), SEED, sink)[0]
    picks, hard = case.settings.get("top_k", 1), case.settings.get("hard", False)
    weights, log_probs = [], []
    for b, h, q in itertools.product(range(batch), range(heads), range(queries)):
        keys = keep[b, h, q].nonzero()[:, 0].tolist()
        full = torch.zeros(columns, dtype=torch.float64)
        weights.append(full)
        log_probs.append(torch.zeros((), dtype=torch.float64))
        if not keys:
            continue
        s = scores[b, h, q, keys]
        noisy = case.settings.get("estimator") != "noisy_gradient"
        best = (s + noisy * c[h] * main[b, h, q, keys]).detach().sort(descending=True).indices.tolist()
        row = Row(s, [g[b, h, q, keys] for g in drawn], tau[h], c[h], best[:picks], picks)
        soft = case.surrogate(row)
        weights[-1] = full.index_put((torch.tensor(keys),), row.hot + soft - soft.detach() if hard else soft)
        log_probs[-1] = log_prob(row)
    return torch.stack(weights).reshape(scores.shape), torch.stack(log_probs).reshape(scores.shape[:3])


def blocks(*inputs: Tensor, **settings: Any) -> AttentionInfo:
    return blockwise.attention_with_choice(attention_problem(*inputs, **settings), TWO_QUERIES)


IMPLS: dict[str, Callable[..., AttentionInfo]] = {"reference": ga.gumbel_attention_with_info, "blockwise": blocks}


class Problem:
    """Random inputs whose gradients are compared, and attention over them by hand."""

    def __init__(self, mask: str, estimator: str | None) -> None:
        draw = torch.Generator().manual_seed(3)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_()

        self.q, self.k, self.v = (
            leaf(BATCH, HEADS, QUERIES, DIM),
            leaf(BATCH, HEADS, KEYS, DIM),
            leaf(BATCH, HEADS, KEYS, 3),
        )
        smallest = 1.0 if estimator == "reinmax" else 0.4
        self.tau = torch.tensor([smallest, smallest + 0.9], dtype=torch.float64, requires_grad=True)
        self.c = torch.tensor([0.8, 1.3], dtype=torch.float64, requires_grad=True)
        self.keep = torch.ones(BATCH, HEADS, QUERIES, KEYS, dtype=torch.bool)
        self.bias = self.sinks = None
        if mask != "none":
            self.keep = torch.rand(self.keep.shape, generator=draw) > 0.4
            self.keep[0, 0, 1] = False
            self.keep[1, 0, 2] = torch.arange(KEYS) == 3
        if mask == "float":
            self.bias = leaf(*self.keep.shape)
        if mask == "sinks":
            self.sinks = leaf(HEADS)
        self.d_out = torch.randn((BATCH, HEADS, QUERIES, 3), dtype=torch.float64, generator=draw)
        self.d_log_prob = torch.randn((BATCH, HEADS, QUERIES), dtype=torch.float64, generator=draw)
        named = {"q": self.q, "k": self.k, "v": self.v, "tau": self.tau, "noise_scale": self.c}
        named |= {"bias": self.bias, "sinks": self.sinks}
        self.wanted = {name: x for name, x in named.items() if x is not None}

    def mask(self) -> Tensor | None:
        if self.bias is not None:
            return self.bias.masked_fill(~self.keep, -math.inf)
        return None if self.keep.all() else self.keep

    def attend(self, impl: str, **settings: Any) -> AttentionInfo:
        inputs = (self.q, self.k, self.v, self.mask())
        return IMPLS[impl](
            *inputs, tau=self.tau, noise_scale=self.c, sinks=self.sinks, scale=0.9, seed=SEED, **settings
        )

    def by_hand(self, case: Case, seed: int = SEED) -> tuple[Tensor, Tensor]:
        scores, keep = 0.9 * self.q @ self.k.mT + (0.0 if self.bias is None else self.bias), self.keep
        if self.sinks is not None:
            column = self.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
            keep = torch.cat([keep, torch.ones_like(column, dtype=torch.bool)], -1)
        weights, log_probs = by_hand(case, scores, keep, self.tau, self.c, seed, self.sinks is not None)
        return weights[..., :KEYS] @ self.v, log_probs

    def gradients_of(self, output: Tensor, log_probs: Tensor | None) -> dict[str, Tensor]:
        loss = (output * self.d_out).sum()
        if log_probs is not None:
            loss = loss + (log_probs * self.d_log_prob).sum()
        return gradients(loss, self.wanted)


def gradients(loss: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = list(wanted.values())
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True, retain_graph=True)
    return dict(zip(wanted, grads, strict=True))


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two sets of gradients."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "sinks"])
@pytest.mark.parametrize("name", CASES)
def test_attention_has_the_papers_gradient(name: str, mask: str, impl: str) -> None:
    case = CASES[name]
    problem = Problem(mask, case.settings.get("estimator"))
    info = problem.attend(impl, **case.settings)
    output, log_probs = problem.by_hand(case)
    sampled = info.log_prob is not None
    assert sampled == (case.settings.get("hard", False) and name not in NOT_SAMPLED)
    torch.testing.assert_close(info.output, output, rtol=1e-12, atol=1e-12)
    if info.log_prob is not None:
        torch.testing.assert_close(info.log_prob, log_probs, rtol=1e-11, atol=1e-11)
    got = problem.gradients_of(info.output, info.log_prob)
    want = problem.gradients_of(output, log_probs if sampled else None)
    for key, grad in want.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")

    wrong, _ = problem.by_hand(case._replace(surrogate=case.wrong or case.surrogate))
    assert far(problem.gradients_of(wrong, log_probs if sampled else None), got) > 1e-2
    if name not in WITHOUT_NOISE and case.settings.get("estimator") not in ("score_function", "reinmax"):
        shifted, _ = problem.by_hand(case, SEED + 1)  # the same choice, other noise in the backward pass
        assert far(problem.gradients_of(shifted, log_probs if sampled else None), got) > 1e-2


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mask", [None, "logits", "bool", "float"])
def test_gumbel_softmax_has_the_papers_gradient(name: str, mask: str | None) -> None:
    case = CASES[name]
    smallest = 1.2 if case.settings.get("estimator") == "reinmax" else 0.6
    tau, c = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (smallest, 0.8))
    logits = torch.randn(2, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(logits.shape) > (-1.0 if mask is None else 0.4)
    if mask is not None:
        keep[0, 1, 1] = False
    bias = torch.randn(logits.shape, dtype=torch.float64, requires_grad=mask == "float")
    given = logits.masked_fill(~keep, -math.inf) if mask == "logits" else logits
    added = {"bool": keep, "float": bias.masked_fill(~keep, -math.inf)}.get(mask or "none")
    info = ga.gumbel_softmax_with_info(given, tau, noise_scale=c, mask=added, seed=SEED, **case.settings)

    heads = [x.expand(4) for x in (tau, c)]
    scores = logits + bias if mask == "float" else logits
    weights, log_probs = by_hand(case, scores.reshape(1, 4, 3, 6), keep.reshape(1, 4, 3, 6), *heads)
    d_weights, d_log_prob = torch.randn(1, 4, 3, 6).double(), torch.randn(1, 4, 3).double()

    named = {"logits": logits, "tau": tau, "noise_scale": c, "bias": bias}
    wanted = {key: x for key, x in named.items() if x.requires_grad}

    def of_both(weights: Tensor, log_prob: Tensor | None) -> dict[str, Tensor]:
        loss = (weights.reshape(1, 4, 3, 6) * d_weights).sum()
        return gradients(loss if log_prob is None else loss + (log_prob.reshape(1, 4, 3) * d_log_prob).sum(), wanted)

    torch.testing.assert_close(info.weights, weights.reshape(logits.shape), rtol=1e-12, atol=1e-12)
    got = of_both(info.weights, info.log_prob)
    want = of_both(weights, None if info.log_prob is None else log_probs)
    for key, grad in want.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
    if info.log_prob is not None:  # the control: log P[idx], which contains the noise
        indices = info.indices if info.indices is not None and info.indices.ndim == 4 else info.indices[..., None]
        g = noise_of(case, (1, 4, 3, 6), SEED, False)[0].reshape(logits.shape)
        z = ((scores.reshape(logits.shape) + c * g) / tau).masked_fill(~keep, -1e300)
        noisy = z.log_softmax(-1).gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, 0.0).sum(-1)
        assert far(of_both(info.weights, noisy), got) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", [*IMPLS, "softmax"])
def test_one_sample_of_gumbel_rao_is_straight_through_to_the_bit(impl: str, dtype: torch.dtype) -> None:
    leaf = [torch.randn(2, 3, 5, 5, dtype=dtype, requires_grad=True) for _ in range(3)]
    d_out = torch.randn(2, 3, 5, 5, dtype=dtype)

    def gradients(**settings: Any) -> tuple[Tensor, ...]:
        if impl == "softmax":
            out = ga.gumbel_softmax(leaf[0], 0.7, True, seed=5, **settings)
        else:
            out = IMPLS[impl](*leaf, tau=0.7, hard=True, seed=5, **settings).output
        return torch.autograd.grad(out, leaf, d_out, allow_unused=True, materialize_grads=True)

    straight, one, two = (gradients(), *(gradients(estimator="gumbel_rao", samples=k) for k in (1, 2)))
    assert all(map(torch.equal, straight, one))
    assert not torch.equal(one[0], two[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mask", ["none", "float", "sinks"])
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_gradcheck_of_log_prob(top_k: int | None, mask: str, impl: str) -> None:
    problem = Problem(mask, None)
    names = [name for name in problem.wanted if name not in ("v", "tau")]

    def log_probs(*_: Tensor) -> Tensor:
        info = problem.attend(impl, hard=True, estimator="score_function", top_k=top_k)
        assert info.log_prob is not None
        return info.log_prob

    assert torch.autograd.gradcheck(log_probs, [problem.wanted[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mask", ["none", "float", "sinks"])
def test_gradcheck_of_the_relaxed_subset(mask: str, impl: str) -> None:
    problem = Problem(mask, None)
    settings = {"top_k": 3, "dropout_p": 0.2}
    assert torch.autograd.gradcheck(
        lambda *_: problem.attend(impl, **settings).output, list(problem.wanted.values()), fast_mode=True
    )


@pytest.mark.parametrize("tau", [1.0, 1.5, 10.0])
def test_reinmax_is_its_authors_package(tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """reinmax 0.1.0 (PyPI, by the authors), given the same choice: it draws by torch.multinomial alone."""
    package = pytest.importorskip("reinmax")
    logits = (2.0 * torch.randn(50, 7, dtype=torch.float64)).requires_grad_()
    d_weights = torch.randn(50, 7, dtype=torch.float64)
    info = ga.gumbel_softmax_with_info(logits, tau, True, estimator="reinmax", seed=4)
    assert info.indices is not None
    sample = info.indices[:, None]
    monkeypatch.setattr(torch, "multinomial", lambda *args, **kw: sample)
    weights, _ = package.reinmax(logits, tau)
    other, _ = package.reinmax(logits, tau + 0.1)
    assert torch.equal(weights, info.weights)
    (want,) = torch.autograd.grad(weights, logits, d_weights)
    (got,) = torch.autograd.grad(info.weights, logits, d_weights, retain_graph=True)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    (control,) = torch.autograd.grad(other, logits, d_weights)
    assert (control - got).abs().max() > 1e-5
