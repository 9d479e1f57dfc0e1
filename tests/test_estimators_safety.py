"""Estimators under masks, in every dtype, at every temperature, compiled, without memory, and asked for nonsense."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gumbel_attention as ga
from gumbel_attention.functional import SoftmaxInfo
from gumbel_attention.impl import blockwise
from models import inputs, trained

HARD: dict[str, Any] = {"hard": True}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "straight_through": HARD,
    "gumbel_rao": HARD | {"estimator": "gumbel_rao", "samples": 3},
    "reinmax": HARD | {"estimator": "reinmax"},
    "score_function": HARD | {"estimator": "score_function"},
    "noisy_gradient": HARD | {"estimator": "noisy_gradient"},
    "three keys, soft": {"top_k": 3},
    "three keys": HARD | {"top_k": 3},
    "three keys, score_function": HARD | {"top_k": 3, "estimator": "score_function"},
}
TAUS = [1e-3, 1e-2, 0.3, 1.0, 7.0, 100.0]
MASKS = ["bool", "-inf", "finfo.min", "mixed"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUERIES, KEYS = 6, 8


def taus(name: str) -> list[float]:
    return [max(tau, 1.0) for tau in TAUS] if name == "reinmax" else TAUS


def visible(lead: int) -> Tensor:
    """(lead, QUERIES, KEYS): a row without keys, one with one key, one with two; the last key is never seen."""
    keep = torch.rand(lead, QUERIES, KEYS) > 0.3
    keep[:, 1] = False
    keep[:, 2] = torch.arange(KEYS) == 4
    keep[:, 3] = torch.arange(KEYS) < 2
    keep[..., -1] = False
    return keep


def as_mask(kind: str, keep: Tensor, dtype: torch.dtype) -> Tensor:
    if kind == "bool":
        return keep
    low = torch.full(keep.shape, {"-inf": -math.inf}.get(kind, torch.finfo(dtype).min), dtype=dtype)
    if kind == "mixed":
        low[..., ::2] = -math.inf
    return torch.where(keep, torch.randn(keep.shape, dtype=dtype), low).requires_grad_()


def check_choice(indices: Tensor | None, log_prob: Tensor | None, keep: Tensor, picks: int, sampled: bool) -> None:
    """Only keys that take part are chosen, none twice, as many as there are."""
    if indices is None:
        return
    indices = indices.reshape(*keep.shape[:-1], -1)
    took = indices >= 0
    assert torch.equal(took.sum(-1), keep.sum(-1).clamp(max=picks))
    assert torch.equal(took, torch.arange(picks) < took.sum(-1, keepdim=True))
    assert keep.gather(-1, indices.clamp(min=0))[took].all()
    once = torch.zeros(keep.shape, dtype=torch.int64).scatter_add(-1, indices.clamp(min=0), took.long())
    assert once.max() == 1
    if sampled:
        assert log_prob is not None
    if log_prob is None:
        return
    assert log_prob.isfinite().all()
    assert (log_prob <= 1e-6).all()
    assert (log_prob[~keep.any(-1)] == 0).all()


def loss_of(values: Tensor, log_prob: Tensor | None) -> Tensor:
    loss = (values.float() * torch.randn(values.shape)).sum()
    return loss if log_prob is None else loss + log_prob.sum()


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_attention_is_finite_and_knows_its_mask(name: str, kind: str, dtype: torch.dtype, impl: str) -> None:
    """One head for each temperature, the second example with scores ten times as large."""
    settings, heads = ESTIMATORS[name], len(TAUS)
    keep = visible(heads).expand(2, -1, -1, -1)
    mask = as_mask(kind, keep, dtype)
    q, k, v = (torch.randn(2, heads, n, 4).to(dtype) for n in (QUERIES, KEYS, KEYS))
    q[1] *= 10.0
    leaves = [x.requires_grad_() for x in (q, k, v)] + ([mask] if mask.requires_grad else [])
    tau = torch.tensor(taus(name), requires_grad=True)
    scale = torch.ones(heads, requires_grad=True)
    call = settings | {"tau": tau, "noise_scale": scale, "seed": 2, "impl": impl, "need_weights": impl == "reference"}
    info = ga.gumbel_attention_with_info(q, k, v, mask, **call)

    assert info.output.dtype == dtype
    assert info.output.isfinite().all()
    empty = ~keep.any(-1)
    assert (info.output[empty] == 0).all()
    check_choice(info.indices, info.log_prob, keep, settings.get("top_k", 1), name != "noisy_gradient")
    if info.weights is not None:
        assert (info.weights[~keep] == 0).all()
        torch.testing.assert_close(info.weights.float().sum(-1), (~empty).float(), rtol=0, atol=2e-2)
    grads = torch.autograd.grad(
        loss_of(info.output, info.log_prob), [*leaves, tau, scale], allow_unused=True, materialize_grads=True
    )
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][empty] == 0).all()
    assert all((grad[:, :, -1] == 0).all() for grad in grads[1:3])
    if mask.requires_grad:
        assert (grads[3][~keep] == 0).all()
        assert (grads[3] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["logits", *MASKS])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_gumbel_softmax_is_finite_and_knows_its_mask(name: str, kind: str, dtype: torch.dtype) -> None:
    settings = ESTIMATORS[name]
    keep = visible(3)
    logits = (4.0 * torch.randn(keep.shape)).to(dtype).requires_grad_()
    for tau in taus(name):
        if kind == "logits":
            info = ga.gumbel_softmax_with_info(logits.masked_fill(~keep, -math.inf), tau, seed=2, **settings)
        else:
            info = ga.gumbel_softmax_with_info(logits, tau, mask=as_mask(kind, keep, dtype), seed=2, **settings)
        assert info.weights.dtype == dtype
        assert (info.weights[~keep] == 0).all()
        torch.testing.assert_close(info.weights.float().sum(-1), keep.any(-1).float(), rtol=0, atol=2e-2)
        check_choice(info.indices, info.log_prob, keep, settings.get("top_k", 1), name != "noisy_gradient")
        (grad,) = torch.autograd.grad(loss_of(info.weights, info.log_prob), logits)
        assert grad.isfinite().all()
        assert (grad[~keep] == 0).all()


def test_a_formula_in_exponentials_does_not_pass() -> None:
    """The control: Gumbel noise given the choice as public code has it, from exp(scores), is NaN at masked keys."""
    scores = torch.tensor([0.5, -math.inf, 100.0])
    rates, fresh = scores.exp(), torch.empty(3).exponential_()
    given = -(fresh / rates + fresh[0] / rates.sum()).log() - scores
    assert not given.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # by the compiler
@pytest.mark.parametrize(
    ("name", "impl"),
    [
        ("gumbel_rao", "reference"),
        ("reinmax", "reference"),
        ("score_function", "blockwise"),
        ("three keys", "blockwise"),
    ],
)
def test_compiled_it_is_the_same(name: str, impl: str) -> None:
    keep = torch.rand(2, 1, 4, 6) > 0.3
    leaves = [torch.randn(2, 2, n, 4, requires_grad=True) for n in (4, 6, 6)]
    tau = torch.tensor(1.3, requires_grad=True)

    def attend(*args: Tensor) -> tuple[Tensor, Tensor | None]:
        *qkv, tau = args
        fewer = {"samples": 2} if name == "gumbel_rao" else {}
        settings = ESTIMATORS[name] | fewer | {"tau": tau, "seed": 3, "impl": impl, "need_weights": False}
        info = ga.gumbel_attention_with_info(*qkv, keep, **settings)
        return info.output, info.log_prob

    def results(function: Any) -> tuple[Tensor, ...]:
        output, log_prob = function(*leaves, tau)
        loss = output.square().sum() if log_prob is None else output.square().sum() + log_prob.sum()
        grads = torch.autograd.grad(loss, [*leaves, tau], allow_unused=True, materialize_grads=True)
        return (output.detach(), *grads)

    torch._dynamo.reset()
    compiled = results(torch.compile(attend, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, results(attend), rtol=1e-5, atol=1e-6)


# Memory


class Allocated(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live; ``peak`` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def peak_of_log_prob(length: int, impl: str) -> int:
    """Bytes that output and log-probabilities take at most, with their backward pass."""
    leaves = [torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3)]
    settings: dict[str, Any] = {"hard": True, "estimator": "score_function", "impl": impl, "need_weights": False}
    with Allocated() as allocated:
        info = ga.gumbel_attention_with_info(*leaves, seed=1, **settings)
        assert info.log_prob is not None
        torch.autograd.grad(info.output.sum() + info.log_prob.sum(), leaves)
    return allocated.peak


def test_memory_of_log_prob_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise.attention_with_choice, "__defaults__", (2**15,))  # scores of a block
    small, large = (peak_of_log_prob(length, "blockwise") for length in (512, 1024))
    assert large < 2.2 * small
    small, large = (peak_of_log_prob(length, "reference") for length in (512, 1024))  # the control
    assert large > 3.5 * small


# Bad input


QKV = (torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
SAMPLED = ["gumbel_rao", "reinmax", "score_function"]
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(({"estimator": name}, ValueError, "needs hard=True, got hard=False") for name in SAMPLED),
    *(
        (HARD | {"estimator": name, "noise": noise}, ValueError, f"only noise='gumbel' gives, got noise='{noise}'")
        for name, noise in itertools.product(SAMPLED, ("none", "normal", "logistic"))
    ),
    (HARD | {"estimator": "gumbel_rao", "samples": 0}, ValueError, "samples must be None or an integer >= 1, got 0"),
    (HARD | {"estimator": "gumbel_rao", "samples": 1.5}, TypeError, "samples must be .* of type float"),
    (HARD | {"estimator": "gumbel_rao", "samples": True}, TypeError, "samples must be .* of type bool"),
    (HARD | {"samples": 2}, ValueError, "samples=2 is for estimator='gumbel_rao', got estimator=None"),
    (HARD | {"estimator": "reinmax", "samples": 2}, ValueError, "got estimator='reinmax'"),
    ({"top_k": 0}, ValueError, "top_k must be None or an integer >= 1, got 0"),
    ({"top_k": "2"}, TypeError, "top_k must be .* of type str"),
    (HARD | {"estimator": "reinmax", "tau": 0.9}, ValueError, "'reinmax' is defined for tau >= 1.0, got tau=0.9"),
    (HARD | {"estimator": "reinmax", "top_k": 2}, ValueError, "passes the choice of one key, got top_k=2"),
    (HARD | {"estimator": "gumbel_rao", "top_k": 1}, ValueError, "passes the choice of one key, got top_k=1"),
    (HARD | {"estimator": "rein_max"}, ValueError, "Did you mean 'reinmax'"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ga.gumbel_attention(*QKV, **settings)
    with pytest.raises(error, match=message):
        ga.gumbel_softmax(QKV[0], **settings)
    with pytest.raises(error, match=message):
        ga.GumbelAttentionConfig(**settings)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_sampled_choice_needs_noise(name: str) -> None:
    settings: dict[str, Any] = HARD | {"estimator": name, "noise_scale": 0.0}
    message = f"noise_scale of estimator='{name}' must be a finite number > 0, got 0.0"
    with pytest.raises(ValueError, match=message):
        ga.gumbel_attention(*QKV, **settings)
    with pytest.raises(ValueError, match=message):
        ga.gumbel_softmax(QKV[0], **settings)
    with pytest.raises(ValueError, match=message):
        ga.GumbelAttentionConfig(**settings)


@pytest.mark.parametrize("learn_tau", ["scalar", "head"])
@pytest.mark.parametrize("name", ["reinmax", "score_function"])
def test_a_temperature_without_gradient_is_not_learned(name: str, learn_tau: str) -> None:
    with pytest.raises(ValueError, match=f"needs a gradient of tau, and estimator='{name}' has none"):
        ga.GumbelAttentionConfig(hard=True, estimator=name, learn_tau=learn_tau)
    assert ga.GumbelAttentionConfig(hard=True, estimator="gumbel_rao", learn_tau=learn_tau).learn_tau == learn_tau


def test_reinmax_keeps_its_temperature_in_a_patched_model() -> None:
    model = trained("bert")
    patch = ga.patch_model(model, ga.GumbelAttentionConfig(hard=True, estimator="reinmax", tau=2.0))
    before = [tau.item() for tau in patch.tau]
    with pytest.raises(ValueError, match=r"defined for tau >= 1.0, got tau=0.5"):
        patch.set_tau(0.5)
    assert [tau.item() for tau in patch.tau] == before == [2.0, 2.0]
    patch.set_tau(1.0)
    model(**inputs(model)).logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("impl", ["cpu", "sdpa", "triton"])
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "straight_through"])
def test_an_implementation_without_the_estimator_says_so(name: str, impl: str) -> None:
    with pytest.raises(ValueError, match=f"impl='{impl}' cannot compute this call: .* Use impl='auto'"):
        ga.gumbel_attention(*QKV, impl=impl, **ESTIMATORS[name])
    explanation = ga.explain(*QKV, **ESTIMATORS[name])
    assert explanation.impl in ("reference", "blockwise")


def test_gumbel_softmax_info_of_a_soft_or_deterministic_choice() -> None:
    soft, fixed = (ga.gumbel_softmax_with_info(QKV[0], **settings) for settings in ({}, HARD | {"noise": "none"}))
    assert isinstance(soft, SoftmaxInfo)
    assert soft[1:] == (None, None)
    assert torch.equal(fixed.indices, QKV[0].argmax(-1))
    assert fixed.log_prob is None


# The score function's helpers


def test_the_loss_is_the_written_one() -> None:
    log_prob = torch.randn(4, 3, requires_grad=True)
    losses = (log_prob * 0.5 + torch.rand(4, 3)).square()
    baseline = torch.randn(3)
    loss = ga.score_function_loss(losses, log_prob, baseline)
    torch.testing.assert_close(loss, losses.mean())
    (pathwise,) = torch.autograd.grad(losses.mean(), log_prob, retain_graph=True)
    (got,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(got, pathwise + (losses - baseline).detach() / 12)


def test_moving_average_baseline() -> None:
    average, decay, means = ga.MovingAverageBaseline(0.8), 0.8, [3.0, -1.0, 2.0]
    assert average.value == 0.0
    for n, mean in enumerate(means, start=1):
        average.update(torch.tensor([mean - 1.0, mean + 1.0]))
        weights = [decay ** (n - 1 - i) for i in range(n)]
        want = sum(w * m for w, m in zip(weights, means, strict=False)) / sum(weights)
        assert average.value.item() == pytest.approx(want, rel=1e-5)
    restored = ga.MovingAverageBaseline(0.8)
    restored.load_state_dict(average.state_dict())
    for copy in (average, restored):
        copy.update(torch.tensor(5.0))
    assert torch.equal(restored.value, average.value)
    assert not average.value.requires_grad
    for wrong in (0.0, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="decay must be"):
            ga.MovingAverageBaseline(wrong)


def test_bad_losses_and_baselines() -> None:
    log_prob, losses = torch.zeros(3, requires_grad=True), torch.rand(3)
    with pytest.raises(ValueError, match=r"losses must be per example, .* Use reduction='none'"):
        ga.score_function_loss(losses.mean(), log_prob)
    with pytest.raises(ValueError, match=r"must have one shape, .* got \(2, 3\) and \(3,\)"):
        ga.score_function_loss(losses.expand(2, 3), log_prob)
    with pytest.raises(ValueError, match=r"baseline must broadcast to the losses' shape \(3,\), got \(2, 1\)"):
        ga.score_function_loss(losses, log_prob, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"baseline must broadcast to the losses' shape \(3,\), got \(2,\)"):
        ga.score_function_loss(losses, log_prob, torch.zeros(2))
    for too_few in (torch.rand(1, 3), torch.tensor(1.0), torch.rand(0, 3)):
        with pytest.raises(ValueError, match="K >= 2 samples"):
            ga.leave_one_out(too_few)
    samples = torch.rand(3, 2, requires_grad=True)
    want = torch.stack([samples[[j for j in range(3) if j != i]].mean(0) for i in range(3)])
    torch.testing.assert_close(ga.leave_one_out(samples), want.detach())
