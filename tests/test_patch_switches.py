"""Switches of a patch in force: hard or soft, layer by layer, and a seed for each example."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gumbel_attention as ga
from models import ARMS, build, inputs, logits

Config = ga.GumbelAttentionConfig
SOFT = Config(noise="none", tau=0.7)
HARD = Config(noise="none", tau=0.7, hard=True)


def patched(config: Config, name: str = "bert") -> tuple[Any, Any]:
    model = build(name).eval()
    return model, ga.patch_model(model, config)


def test_hard_and_soft_are_the_other_arm_and_come_back() -> None:
    (soft, soft_patch), (hard, hard_patch) = patched(SOFT), patched(HARD)
    before = logits(soft), logits(hard)
    assert not torch.equal(*before)
    with soft_patch.hard(True), hard_patch.hard(False):
        assert torch.equal(logits(soft), before[1])
        assert torch.equal(logits(hard), before[0])
    assert torch.equal(logits(soft), before[0])
    soft_patch.hard(True)
    assert torch.equal(logits(soft), before[1])
    soft_patch.hard(None)
    assert torch.equal(logits(soft), before[0])


def test_layers_turn_hard_one_by_one() -> None:
    model, patch = patched(SOFT)
    by_selection = build("bert").eval()
    ga.patch_model(by_selection, replace(SOFT, layers=[0]))
    ga.patch_model(by_selection, replace(HARD, layers=[1]))
    with patch.hard(True, layers=[-1]):
        assert torch.equal(logits(model), logits(by_selection))
        assert not torch.equal(logits(model), logits(patched(HARD)[0]))
    with pytest.raises(IndexError):
        patch.hard(True, layers=[0, 2])
    assert torch.equal(logits(model), logits(patched(SOFT)[0]))  # the layer that exists is as it was


def test_the_switch_holds_in_training_and_before_eval_hard() -> None:
    model, patch = patched(replace(SOFT, eval_hard=False))
    model.train()
    with patch.hard(True):
        assert all(state.hard(training=True) and state.hard(training=False) for state in patch._states)
    assert not any(state.hard(training) for state in patch._states for training in (True, False))


@pytest.mark.parametrize("on", [1, "yes"])
def test_other_switches_are_refused(on: Any) -> None:
    _, patch = patched(SOFT)
    with pytest.raises(TypeError, match="hard must be True, False or None"):
        patch.hard(on)


def rows(model: Any, batch: dict[str, Tensor], order: list[int]) -> Tensor:
    return logits(model, {name: tensor[order] for name, tensor in batch.items()})


@pytest.mark.parametrize("arm", ["gumbel-soft", "gumbel-st"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_examples_noise_depends_on_its_seed_and_not_on_its_batch(name: str, arm: str) -> None:
    model, patch = patched(ARMS[arm], name)
    batch, seeds = {key: x[:2] for key, x in inputs(model).items()}, torch.tensor([11, -5])
    with patch.seeds(seeds):
        first = rows(model, batch, [0, 1])
        assert torch.equal(rows(model, batch, [0, 1]), first)
    with patch.seeds(seeds.flip(0)):
        torch.testing.assert_close(rows(model, batch, [1, 0]).flip(0), first, rtol=1e-5, atol=1e-5)
    with patch.seeds(seeds[1:]):
        torch.testing.assert_close(rows(model, batch, [1]), first[1:], rtol=1e-5, atol=1e-5)
    with patch.seeds(seeds + 1):  # the control
        assert (rows(model, batch, [0, 1]) - first).abs().max() > 1e-3
    assert not torch.equal(rows(model, batch, [0, 1]), rows(model, batch, [0, 1]))


@pytest.mark.parametrize("heads", [None, (0, 2)])
@pytest.mark.parametrize("switch", ["noise", "no noise", "expected choice"])
def test_dropout_of_the_weights_repeats_with_the_seed(switch: str, heads: tuple[int, ...] | None) -> None:
    model = build("bert").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.3
    patch = ga.patch_model(model, Config(heads=heads))
    batch = {key: x[:2] for key, x in inputs(model).items()}
    seeds = torch.tensor([11, -5])
    with patch.noise(switch == "noise"), ga.soft_attention(model) if switch == "expected choice" else nullcontext():
        with patch.seeds(seeds):
            first = rows(model, batch, [0, 1])
            assert torch.equal(rows(model, batch, [0, 1]), first)
        with patch.seeds(seeds[1:]):
            torch.testing.assert_close(rows(model, batch, [1]), first[1:], rtol=1e-5, atol=1e-5)
        with patch.seeds(seeds + 1):  # the control
            assert (rows(model, batch, [0, 1]) - first).abs().max() > 1e-3
        assert not torch.equal(rows(model, batch, [0, 1]), rows(model, batch, [0, 1]))


@pytest.mark.parametrize("learn_tau", [None, "head"])
def test_a_patch_made_in_inference_mode_is_one_like_any_other(learn_tau: Any) -> None:
    model = build("bert")
    with torch.inference_mode():
        patch = ga.patch_model(model, Config(learn_tau=learn_tau))
    model.train()
    patch.set_noise_scale(0.5)
    if learn_tau is None:
        patch.set_tau(0.5)
    model(**inputs(model)).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in patch.learned_tau_parameters())


def test_layers_draw_different_noise_from_one_seed() -> None:
    _, patch = patched(ARMS["gumbel-st"])
    with patch.seeds(torch.arange(1000)):
        drawn = torch.stack([state.seeds for state in patch._states])
    assert drawn.unique().numel() == drawn.numel()
    assert all(state.seeds is None for state in patch._states)


@pytest.mark.parametrize("seeds", [3, torch.tensor(3), torch.tensor([1.0, 2.0]), [1, 2]])
def test_seeds_of_another_form_are_refused(seeds: Any) -> None:
    _, patch = patched(ARMS["gumbel-st"])
    with pytest.raises(TypeError, match="int64 tensor of shape"):
        patch.seeds(seeds)


def test_seeds_of_another_batch_are_refused() -> None:
    model, patch = patched(ARMS["gumbel-st"])
    with patch.seeds(torch.arange(7)), pytest.raises(ValueError, match="seed"):
        logits(model)
