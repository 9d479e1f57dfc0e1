"""The score function estimator of whole models: what is collected, its gradient, and what it leaves behind."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.utils import set_seed
from scipy import stats
from torch import Tensor, nn

import gumbel_attention as ga
from forked import run_in_two
from gumbel_attention.integrations import rewritten_softmax
from gumbel_attention.modules import GumbelSetAttention
from gumbel_attention.score_function import CollectedLogProbs
from gumbel_attention.state import AttentionState
from models import ENCODER, TOKENS, build, fingerprint, inputs, logits, trained, without_dropout

SCORE = ga.GumbelAttentionConfig(hard=True, estimator="score_function", noise_scale=0.8, tau=0.5)
Gradients = dict[str, Tensor]


def bert(config: ga.GumbelAttentionConfig = SCORE) -> Any:
    model = trained("bert", "sdpa")
    ga.patch_model(model, config)
    return model


def rewritten(cls: Any, settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(settings)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0.0, 0.2)
    return without_dropout(model).train()


def bloom(config: ga.GumbelAttentionConfig = SCORE) -> Any:
    """It computes its scores itself, (B, H, Q, K)."""
    model = rewritten(hf.BloomForCausalLM, hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **TOKENS))
    ga.patch_model(model, config)
    return model


def deberta(config: ga.GumbelAttentionConfig = SCORE) -> Any:
    """It computes its scores itself, (B * H, Q, K) or (B, H, Q, K), and masks all keys of a padded query."""
    model = rewritten(hf.DebertaV2ForTokenClassification, hf.DebertaV2Config(**ENCODER))
    ga.patch_model(model, config)
    return model


MODELS: dict[str, Callable[..., Any]] = {"bert": bert, "bloom": bloom, "deberta": deberta}


def states(model: nn.Module) -> list[AttentionState]:
    return [module for module in model.modules() if isinstance(module, AttentionState)]


def losses_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B,): an example's mean over its real positions."""
    each = model(**batch).logits.float().square().mean(-1)
    keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return (each * keep).sum(-1) / keep.sum(-1)


def step(model: Any, batch: dict[str, Tensor], seed: int = 0, baseline: float = 0.3) -> CollectedLogProbs:
    """One forward and backward pass with the score function, after ``torch.manual_seed``; gradients accumulate."""
    torch.manual_seed(seed)
    with ga.collect_log_probs(model) as chosen:
        losses = losses_of(model, batch)
    ga.score_function_loss(losses, chosen.log_prob(), baseline).backward()
    return chosen


def gradients(model: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(one: Gradients, other: Gradients, **tolerance: float) -> None:
    assert one.keys() == other.keys()
    assert one
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The log-probabilities (B, H, Q) of every attention call, from its scores and the keys it weighed."""
    found: list[Tensor] = []
    attend, choose = sys.modules["gumbel_attention.attend"], rewritten_softmax.choose
    with_info = ga.gumbel_attention_with_info

    def add(scores: Tensor, indices: Tensor) -> None:
        log_p = (scores / SCORE.noise_scale).log_softmax(-1).gather(-1, indices.clamp(min=0)[..., None])[..., 0]
        found.append(log_p.masked_fill(scores.amax(-1) == -torch.inf, 0.0).detach())

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kw: Any) -> Any:
        info = with_info(query, key, value, mask, *args, **kw)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        hidden = 0.0 if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        assert info.indices is not None
        add(scores + hidden, info.indices)
        return info

    def softmax(scores: Tensor, visible: Tensor, choice: Any) -> Any:
        chosen = choose(scores, visible, choice)
        by_head, indices = scores.masked_fill(~visible, -torch.inf), chosen.weights.argmax(-1)
        add(by_head.reshape(3, 4, *scores.shape[2:]), indices.reshape(3, 4, -1))
        return chosen

    monkeypatch.setattr(attend, "gumbel_attention_with_info", attention)
    monkeypatch.setattr(rewritten_softmax, "choose", softmax)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_collected_log_probability_is_the_sum_over_layers_heads_and_queries(
    name: str, by_hand: list[Tensor]
) -> None:
    model = MODELS[name]()
    batch = inputs(model, "right")
    with ga.collect_log_probs(model) as chosen:
        losses = losses_of(model, batch)
    assert len(by_hand) == len(chosen.layers) == 2
    for got, want in zip(chosen.layers, by_hand, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    total = chosen.log_prob()
    assert total.shape == losses.shape == (3,)
    torch.testing.assert_close(total, sum(by_hand).sum((1, 2)), rtol=1e-4, atol=1e-3)

    mask = batch["attention_mask"].bool()
    real = sum((layer * mask[:, None]).sum((1, 2)) for layer in by_hand)
    torch.testing.assert_close(chosen.log_prob(mask), real, rtol=1e-4, atol=1e-3)
    assert ((chosen.log_prob(mask) - total).abs()[:2].min() > 1.0) == (name != "deberta")  # padding chooses too
    for wrong in (mask[:, 1:], mask.float(), mask[:1]):
        with pytest.raises(ValueError, match=r"query_mask must be bool of shape \(batch, q_len\) = \(3, 12\)"):
            chosen.log_prob(wrong)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_score_function_reaches_queries_and_keys(name: str) -> None:
    def of_scores(model: nn.Module) -> list[Tensor]:
        weights = [p.grad for n, p in model.named_parameters() if n.endswith(("query.weight", "key.weight"))]
        weights += [
            p.grad for n, p in model.named_parameters() if n.endswith(("query_proj.weight", "key_proj.weight"))
        ]
        fused = [p.grad for n, p in model.named_parameters() if n.endswith("query_key_value.weight")]
        weights += [part for p in fused for part in p.unflatten(0, (4, 3, 8)).unbind(1)[:2]]
        assert len(weights) == 4
        return [torch.zeros(()) if grad is None else grad for grad in weights]

    model = MODELS[name]()
    batch = inputs(model, "right")
    losses_of(model, batch).mean().backward()
    assert not any(grad.any() for grad in of_scores(model))
    model.zero_grad()
    step(model, batch)
    assert all((grad != 0).float().mean() > 0.9 for grad in of_scores(model))


@pytest.mark.parametrize("soft_baseline", [False, True])
def test_it_is_unbiased_in_a_model_that_can_be_enumerated(soft_baseline: bool) -> None:
    """One choice among three elements. False alarms at most 1e-6, shared out among the parameters' entries."""
    model = GumbelSetAttention(4, 1, config=SCORE).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.7)
    elements, target = torch.randn(1, 3, 4).double(), torch.randn(4).double()
    parameters = list(model.parameters())

    def cost(output: Tensor) -> Tensor:
        return (output - target).square().sum(-1)

    scores = (model.q_proj(model.queries) @ model.k_proj(elements[0]).T)[0] / 2.0 / SCORE.noise_scale
    outcomes = cost(model.out_proj(model.v_proj(elements[0])))
    exact = torch.autograd.grad((scores.softmax(-1) * outcomes).sum(), parameters)
    baseline: Tensor | float = 0.0
    if soft_baseline:
        with torch.no_grad(), ga.soft_attention(model):
            baseline = cost(model(elements).output[:, 0])
        expected = model.out_proj(scores.softmax(-1) @ model.v_proj(elements[0]))
        torch.testing.assert_close(baseline, cost(expected)[None])

    def estimate(*, with_score: bool) -> list[Tensor]:
        with ga.collect_log_probs(model) as chosen:
            losses = cost(model(elements.expand(500, -1, -1)).output[:, 0])
        log_prob = chosen.log_prob()
        loss = ga.score_function_loss(losses, log_prob, baseline) if with_score else losses.mean() + 0 * log_prob.sum()
        return list(torch.autograd.grad(loss, parameters))

    def worst_t(with_score: bool) -> float:
        batches = [torch.cat([g.flatten() for g in estimate(with_score=with_score)]) for _ in range(60)]
        stacked, want = torch.stack(batches), torch.cat([g.flatten() for g in exact])
        error, spread = stacked.mean(0) - want, stacked.std(0) / math.sqrt(len(stacked))
        return float((error.abs() / (spread + 1e-9)).max())

    bound = float(stats.t.isf(1e-6 / sum(p.numel() for p in parameters) / 2, 59))
    assert worst_t(with_score=True) < bound
    assert worst_t(with_score=False) > bound  # the control: the gradient of the values alone


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_behind(name: str) -> None:
    model = MODELS[name]()
    batch = inputs(model, "right")

    def seen() -> tuple[Tensor, dict[str, Any], list[Any], list[int]]:
        torch.manual_seed(3)
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return logits(model, batch), fingerprint(model), [(s.collector, s.expected) for s in states(model)], hooks

    losses_of(model, batch)  # the first call is checked, by hooks of its own
    before = seen()
    with ga.collect_log_probs(model) as outer:
        losses_of(model, batch)
        with ga.collect_log_probs(model) as inner, pytest.raises(KeyError), ga.soft_attention(model):
            batch["unknown"]
        assert not inner.layers
        with ga.collect_log_probs(model) as inner:
            losses_of(model, batch)
        assert len(inner.layers) == len(outer.layers) == 2
        losses_of(model, batch)
        assert len(outer.layers) == 4
    with pytest.raises(KeyError), ga.collect_log_probs(model), ga.soft_attention(model):
        batch["unknown"]
    after = seen()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert set(after[2]) == {(None, False)}


def test_checkpointing_has_the_same_gradient_or_raises() -> None:
    model = bert()
    batch = inputs(model, "right")
    step(model, batch)
    plain = gradients(model)
    for reentrant in (False, True):
        model.zero_grad()
        newer = hasattr(model, "activation_checkpointing_enable")  # renamed in transformers 5.2x
        enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        if reentrant:
            with pytest.raises(RuntimeError, match="use checkpointing with use_reentrant=False"):
                step(model, batch)
        else:
            chosen = step(model, batch)
            assert len(chosen.layers) == 2
            assert_equal_gradients(gradients(model), plain, rtol=1e-4, atol=1e-6)
    model = bert()
    step(model, batch, seed=1)
    assert any((gradients(model)[name] - plain[name]).abs().max() > 1e-3 for name in plain)  # the control


def test_accumulated_gradients_are_the_sum_over_micro_batches() -> None:
    model = bert()
    batches = [{key: x[rows] for key, x in inputs(model, "right").items()} for rows in (slice(0, 2), slice(2, 3))]
    alone = []
    for seed, batch in enumerate(batches):
        model.zero_grad()
        step(model, batch, seed)
        alone.append(gradients(model))
    model.zero_grad()
    torch.manual_seed(0)
    losses, log_probs = [], []
    for seed, batch in enumerate(batches):  # both forward passes before any backward pass
        torch.manual_seed(seed)
        with ga.collect_log_probs(model) as chosen:
            losses.append(losses_of(model, batch))
        log_probs.append(chosen.log_prob())
    for loss, log_prob in zip(losses, log_probs, strict=True):
        ga.score_function_loss(loss, log_prob, 0.3).backward()
    assert_equal_gradients(gradients(model), {n: alone[0][n] + alone[1][n] for n in alone[0]}, rtol=1e-4, atol=1e-6)
    with ga.collect_log_probs(model) as both:
        for batch in batches:
            losses_of(model, batch)
    with pytest.raises(ValueError, match=r"batches of different sizes, \[1, 2\]"):
        both.log_prob()


def test_without_hard_choices_under_gumbel_noise_there_is_nothing_to_collect() -> None:
    soft, eval_mode, normal = (
        bert(ga.GumbelAttentionConfig()),
        bert().eval(),
        bert(ga.GumbelAttentionConfig(hard=True, noise="normal")),
    )
    for model in (soft, eval_mode, normal):
        with ga.collect_log_probs(model) as chosen:
            losses_of(model, inputs(model))
        with pytest.raises(RuntimeError, match=r"no log-probabilities were collected: .* train"):
            chosen.log_prob()
    straight_through = bert(ga.GumbelAttentionConfig(hard=True))
    with ga.collect_log_probs(straight_through) as chosen:
        losses_of(straight_through, inputs(straight_through))
    assert chosen.log_prob().requires_grad
    with pytest.raises(ValueError, match="BertForTokenClassification has no attention of this library"):
        ga.collect_log_probs(build("bert")).__enter__()
    with pytest.raises(ValueError, match="Linear has no attention"), ga.soft_attention(nn.Linear(1, 1)):
        pass


def test_log_probabilities_without_gradient_are_refused() -> None:
    model = bert()
    batch = inputs(model)
    with ga.collect_log_probs(model) as chosen, torch.no_grad():
        losses = losses_of(model, batch)
    with pytest.raises(RuntimeError, match=r"no torch.no_grad\(\)"):
        chosen.log_prob()
    with torch.no_grad(), ga.collect_log_probs(model) as chosen:
        losses = losses_of(model, batch)
    with pytest.raises(ValueError, match=r"log_prob carries no gradient: .* under torch.no_grad\(\)"):
        ga.score_function_loss(losses, chosen.log_prob())


@pytest.mark.parametrize("name", MODELS)
def test_soft_attention_is_softmax_at_noise_scale(name: str) -> None:
    model = MODELS[name]()
    batch = inputs(model, "right")
    with torch.no_grad(), ga.soft_attention(model), ga.collect_log_probs(model) as chosen:
        got = model(**batch).logits
    assert not chosen.layers
    want, other = (
        logits(MODELS[name](ga.GumbelAttentionConfig(noise="none", tau=tau)), batch)
        for tau in (SCORE.noise_scale, SCORE.tau)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (other - got).abs().max() > 1e-2  # the control


def _one_of_two(folder: Path) -> None:
    """One process of two: its choices and the averaged gradient of a step on its own examples."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    model = accelerator.prepare(bert())
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    own = {key: x[rank : rank + 1] for key, x in inputs(model.module, "right").items()}
    results: dict[str, Any] = {}
    for specific, same in itertools.product((True, False), (True, False)):
        set_seed(3, device_specific=specific)
        batch = inputs(model.module) if same else own
        model.zero_grad()
        with ga.collect_log_probs(model) as chosen:
            losses = losses_of(model, batch)
        accelerator.backward(ga.score_function_loss(losses, chosen.log_prob(), 0.3))
        results[f"{specific} {same}"] = (chosen.log_prob().detach(), gradients(model.module))
    torch.save(results, folder / f"{rank}.pt")
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_average_their_gradients_and_draw_their_own_noise(tmp_path: Path) -> None:
    run_in_two(_one_of_two, tmp_path, log=tmp_path / "log")
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = bert()
    alone = []
    for rank in range(2):
        model.zero_grad()
        chosen = step(model, {key: x[rank : rank + 1] for key, x in inputs(model, "right").items()}, 3 + rank)
        torch.testing.assert_close(results[rank]["True False"][0], chosen.log_prob().detach())
        alone.append(gradients(model))
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    for rank in range(2):
        assert_equal_gradients(results[rank]["True False"][1], mean, rtol=1e-4, atol=1e-6)
    own, shared = ([result[f"{specific} True"][0] for result in results] for specific in (True, False))
    assert (own[0] != own[1]).all()
    assert torch.equal(*shared)  # the control: without device_specific the processes draw alike


def test_soft_attention_without_noise_scale_is_finite_and_nearly_hard() -> None:
    layer = ga.GumbelSetAttention(8, 2, 3, config=ga.GumbelAttentionConfig(hard=True, noise_scale=0.0))
    with ga.soft_attention(layer):
        weights = layer(torch.randn(2, 5, 8)).weights
    torch.testing.assert_close(weights.amax(-1), torch.ones(2, 2, 3))
