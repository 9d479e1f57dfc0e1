"""top_k: several keys without replacement, their relaxation, and what few keys, sinks and dropout make of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import gumbel_attention as ga
from gumbel_attention.config import ESTIMATORS
from gumbel_attention.modules import GumbelSetAttention
from models import inputs, logits, trained

FORMS: dict[str, dict[str, Any]] = {
    "soft": {},
    "straight_through": {"hard": True},
    "deterministic": {"hard": True, "noise": "none"},
    "score_function": {"hard": True, "estimator": "score_function"},
}
IMPLS = ["reference", "blockwise"]


def qkv(keys: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 2, n, m, dtype=dtype, requires_grad=True) for n, m in ((5, 4), (keys, 4), (keys, 3))]


def perturbed(scores: Tensor, noise: str, seed: int) -> Tensor:
    """S + G of scores (B, H, Q, N)."""
    if noise == "none":
        return scores
    return scores + ga.noise.sample(noise, ga.noise.Coordinates(torch.tensor(seed), *scores.shape))


@pytest.mark.parametrize("noise", ["gumbel", "normal", "none"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_keys_of_largest_perturbed_score_get_equal_weights(top_k: int, noise: str) -> None:
    q, k, v = qkv()
    info = ga.gumbel_attention_with_info(q, k, v, tau=0.3, hard=True, noise=noise, top_k=top_k, seed=4)
    z = perturbed(q @ k.mT / 2, noise, 4)
    want = z.topk(top_k, dim=-1).indices
    assert info.indices is not None
    assert info.indices.shape == (2, 2, 5, top_k)
    assert torch.equal(info.indices, want)
    weights = torch.zeros_like(z).scatter(-1, want, 1.0 / top_k)
    assert torch.equal(info.weights, weights)
    torch.testing.assert_close(info.output, weights @ v)
    assert not torch.equal(info.indices, perturbed(q @ k.mT / 2, "gumbel", 5).topk(top_k, dim=-1).indices)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FORMS)
def test_one_of_one_is_the_ordinary_choice(name: str, impl: str) -> None:
    leaves = qkv()

    def result(top_k: int | None) -> list[Tensor]:
        settings = FORMS[name] | {"tau": 0.6, "seed": 3, "impl": impl, "dropout_p": 0.2, "need_weights": False}
        info = ga.gumbel_attention_with_info(*leaves, top_k=top_k, **settings)
        loss = info.output.square().sum() + (0.0 if info.log_prob is None else info.log_prob.sum())
        indices = [] if info.indices is None else [info.indices.reshape(2, 2, 5, -1)]
        return [info.output, *indices, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]

    for got, want in zip(result(1), result(None), strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(result(2)[0], result(1)[0])


def test_rows_with_fewer_keys_take_what_there_is() -> None:
    """No keys, one, two and seven; four are wanted. The first two rows leave nothing to choose."""
    keep = torch.arange(7) < torch.tensor([0, 1, 2, 7, 7])[:, None]
    for name, impl in itertools.product(FORMS, IMPLS):
        q, k, v = qkv()
        settings = FORMS[name] | {"top_k": 4, "tau": 0.5, "seed": 3, "impl": impl}
        info = ga.gumbel_attention_with_info(q, k, v, keep, need_weights=impl == "reference", **settings)
        if info.weights is not None:
            assert not info.weights[~keep.expand_as(info.weights)].any()
            torch.testing.assert_close(info.weights.sum(-1), (keep.any(-1)).double().expand(2, 2, 5))
        torch.testing.assert_close(info.output[..., 1, :], v[..., 0, :])
        if "hard" in settings:
            torch.testing.assert_close(info.output[..., 2, :], v[..., :2, :].mean(-2))
        if info.indices is not None:
            assert torch.equal((info.indices >= 0).sum(-1), torch.tensor([0, 1, 2, 4, 4]).expand(2, 2, 5))
            assert (info.indices[..., 0, :] == -1).all()
            assert (info.indices[..., 1, 1:] == -1).all()
        if info.log_prob is not None:
            assert not info.log_prob[..., :2].any()
            assert (info.log_prob[..., 2:] < 0).all()
        (grad,) = torch.autograd.grad(info.output.square().sum(), q, allow_unused=True, materialize_grads=True)
        assert not grad[..., :2, :].abs().gt(1e-12).any()
        assert grad[..., 3:, :].any() == (name != "score_function")


@pytest.mark.parametrize("name", FORMS)
def test_more_keys_wanted_than_there_are(name: str) -> None:
    settings = FORMS[name] | {"seed": 3}
    info = ga.gumbel_softmax_with_info(torch.randn(4, 3), top_k=5, **settings)
    same = ga.gumbel_softmax_with_info(torch.randn(4, 3), top_k=3, **settings)
    torch.testing.assert_close(info.weights.sum(-1), torch.ones(4))
    if info.indices is not None and same.indices is not None:
        assert torch.equal(info.weights, torch.full((4, 3), 1 / 3))
        assert torch.equal(info.indices[:, :3].sort().values, torch.arange(3).expand(4, 3))
        assert (info.indices[:, 3:] == -1).all()
        assert torch.equal(info.weights, same.weights)


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_along_any_dimension(dim: int) -> None:
    logits = torch.randn(4, 5, 6)
    info = ga.gumbel_softmax_with_info(logits, 0.5, True, dim=dim, top_k=2, seed=1)
    moved = ga.gumbel_softmax_with_info(logits.movedim(dim, -1), 0.5, True, top_k=2, seed=1)
    assert torch.equal(info.weights, moved.weights.movedim(-1, dim))
    assert info.indices is not None
    assert moved.indices is not None
    assert info.log_prob is not None
    assert torch.equal(info.indices, moved.indices)
    assert info.indices.shape == (*info.log_prob.shape, 2)
    assert torch.equal((info.weights > 0).sum(dim), torch.full(info.log_prob.shape, 2))


def relaxation_with_clipped_rest(scores: Tensor, tau: float, top_k: int) -> Tensor:
    """As the authors' code has it: log(max(1 - p, smallest float))."""
    total = torch.zeros_like(scores)
    for _ in range(top_k):
        p = torch.softmax(scores / tau, -1)
        total, scores = total + p, scores + (1.0 - p).clamp(min=torch.finfo(p.dtype).tiny).log()
    return total / top_k


def test_a_key_far_above_the_others_is_taken_once() -> None:
    """1 - p rounds to 0 there: the clipped formula subtracts 87 from a lead of 100, and takes the key again."""
    scores = torch.tensor([[100.0, 1.0, 0.0, 0.0]]).requires_grad_()
    got = ga.gumbel_softmax(scores, 0.5, noise="none", top_k=2)
    exact = relaxation_with_clipped_rest(scores[:, 1:].double(), 0.5, 1)
    torch.testing.assert_close(got[0, 0].item(), 0.5)
    torch.testing.assert_close(got[:, 1:].double(), exact / 2, rtol=0, atol=2e-2)
    assert relaxation_with_clipped_rest(scores, 0.1, 2)[0, 0] > 0.99  # the control
    (grad,) = torch.autograd.grad((got * torch.randn(4)).sum(), scores)
    assert grad.isfinite().all()
    assert (grad[0, 1:] != 0).all()


def test_the_relaxation_hardens_as_tau_falls_and_spreads_as_it_grows() -> None:
    logits = torch.randn(200, 6)
    hard = ga.gumbel_softmax(logits, hard=True, top_k=3, seed=5)
    distances = [float((ga.gumbel_softmax(logits, t, top_k=3, seed=5) - hard).abs().mean()) for t in (1e-5, 0.1, 1.0)]
    assert distances[0] < 1e-3 < distances[1] < distances[2]
    torch.testing.assert_close(
        ga.gumbel_softmax(logits, 1e5, top_k=3, seed=5), torch.full((200, 6), 1 / 6), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sink_takes_one_of_the_places(impl: str) -> None:
    q, k, v = qkv()
    high, low = (torch.full((2,), x, dtype=torch.float64) for x in (1e3, -1e3))
    settings: dict[str, Any] = {"hard": True, "seed": 3, "impl": impl, "need_weights": False}
    drowned = ga.gumbel_attention_with_info(q, k, v, sinks=high, top_k=3, **settings)
    two, three = (ga.gumbel_attention_with_info(q, k, v, top_k=n, **settings) for n in (2, 3))
    assert drowned.indices is not None
    assert (drowned.indices[..., 0] == -1).all()
    assert torch.equal(drowned.indices[..., 1:], two.indices)
    torch.testing.assert_close(drowned.output, two.output * 2 / 3)
    unseen = ga.gumbel_attention_with_info(q, k, v, sinks=low, top_k=3, **settings)
    torch.testing.assert_close(unseen.output, three.output)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_acts_on_each_key_chosen(impl: str) -> None:
    q, k, v = qkv()
    settings: dict[str, Any] = {"hard": True, "top_k": 3, "seed": 3}
    kept = ga.gumbel_attention_with_info(q, k, v, **settings)
    factor = ga.noise.dropout_factor(0.5, ga.noise.Coordinates(torch.tensor(3), 2, 2, 5, 7))
    got = ga.gumbel_attention(q, k, v, dropout_p=0.5, impl=impl, **settings)
    assert kept.weights is not None
    dropped = kept.weights * factor
    torch.testing.assert_close(got, dropped @ v)
    assert 0 < (dropped == 0).logical_and(kept.weights > 0).sum() < (kept.weights > 0).sum()


def test_what_stands_in_an_unchosen_value_is_not_read() -> None:
    q, k, v = qkv()
    keep = torch.ones(7, dtype=torch.bool)
    keep[5:] = False
    for impl, bad in itertools.product(IMPLS, (torch.nan, torch.inf)):
        filled = v.detach().masked_fill(~keep[:, None], bad).requires_grad_()
        mask = keep.expand(5, 7).clone()
        output = ga.gumbel_attention(q, k, filled, mask, hard=True, top_k=3, seed=1, impl=impl)
        torch.testing.assert_close(output, ga.gumbel_attention(q, k, v, mask, hard=True, top_k=3, seed=1))
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), (q, k, filled)))


@pytest.mark.parametrize("name", ["soft", "straight_through", "score_function"])
def test_a_set_attends_to_two_of_its_elements(name: str) -> None:
    model = GumbelSetAttention(8, 2, 3, config=ga.GumbelAttentionConfig(top_k=2, **FORMS[name]))
    out = model(torch.randn(4, 6, 8), mask=torch.arange(6) < torch.tensor([6, 2, 1, 0])[:, None])
    torch.testing.assert_close(out.weights.sum(-1), torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None].expand(4, 2, 3))
    assert (out.indices is None) == (name == "soft")
    if out.indices is not None:
        assert out.indices.shape == (4, 2, 3, 2)
        assert (out.indices >= 0).sum(-1).unique(dim=1).flatten(1).amax(1).tolist() == [2, 2, 1, 0]
    out.output.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", FORMS)
def test_a_patched_model_attends_to_two_tokens(name: str) -> None:
    model = trained("bert")
    batch = inputs(model, "right")
    plain = logits(model, batch)
    with ga.patch_model(model, ga.GumbelAttentionConfig(top_k=2, tau=0.5, **FORMS[name])):
        torch.manual_seed(1)
        got = model(**batch).logits
        got.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert not torch.equal(got, plain)
    assert torch.equal(logits(model, batch), plain)


def test_heads_left_out_choose_nothing() -> None:
    config = ga.GumbelAttentionConfig(hard=True, top_k=2, heads=[0])
    model = GumbelSetAttention(8, 2, 3, config=config)
    out = model(torch.randn(4, 6, 8))
    assert out.indices.shape == (4, 2, 3, 2)
    assert (out.indices[:, 1] == -1).all()
    assert (out.indices[:, 0] >= 0).all()
    assert not out.log_prob[:, 1].any()
    assert (out.weights[:, 1] > 0).all()


@pytest.mark.parametrize("settings", [{"estimator": name} for name in ESTIMATORS] + [{"top_k": 2}], ids=str)
def test_every_module_takes_every_estimator(settings: dict[str, Any]) -> None:
    """Queries get a gradient from the output, but for the score function, and from a sample's log-probability."""
    config = ga.GumbelAttentionConfig(hard=True, **settings)
    module = ga.GumbelMultiheadAttention(8, 2, batch_first=True, config=config)
    x = torch.randn(2, 5, 8)
    with ga.collect_log_probs(module) as chosen:
        output, weights = module(x, x, x, average_attn_weights=False)
    used = torch.full((2, 2, 5), 2 if "top_k" in settings else 1)
    assert torch.equal((weights > 0).sum(-1), used)
    query = torch.autograd.grad(output.square().sum(), module.in_proj_weight, retain_graph=True)[0][:8]
    assert (query.abs().sum() > 0) == (settings.get("estimator") != "score_function")
    if settings.get("estimator") == "noisy_gradient":
        with pytest.raises(RuntimeError, match="no log-probabilities"):  # its choice is no sample
            chosen.log_prob()
    else:
        through = torch.autograd.grad(chosen.log_prob().sum(), module.in_proj_weight)[0][:8]
        assert through.abs().sum() > 0
    pooled = ga.GumbelSetAttention(8, 2, 3, config=config)(x)
    assert pooled.indices is not None
    assert pooled.indices.shape == ((2, 2, 3, 2) if "top_k" in settings else (2, 2, 3))
