"""Layers that become hard one after another, and the controls whose choice no input can change."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import run
from transformers import AutoModelForSequenceClassification

import gumbel_attention as ga
from harness import run as run_module
from harness.arguments import FinetuneArguments
from harness.attention import attention_config, control_attention
from harness.errors import UsageError
from harness.evaluation import evaluation_mode
from harness.fixed_keys import chosen_keys, fix_keys
from harness.hardening import Hardening
from models import build, logits

FILES: dict[str, Any] = {"train_file": "a.tsv", "validation_file": "b.tsv"}
TOP_DOWN: dict[str, Any] = {"hard": True, "harden": "top_down", "harden_start": 0.2, "harden_end": 0.6}


def hard_layers(model: Any) -> list[bool]:
    return [module.hard(training=True) for module in model.modules() if isinstance(module, ga.state.AttentionState)]


@pytest.mark.parametrize(
    ("order", "soft_at_3"), [("top_down", [0, 1]), ("bottom_up", [2, 3]), ("all", [])], ids=lambda value: str(value)
)
def test_layers_turn_hard_in_order_and_stay_hard(order: Any, soft_at_3: list[int]) -> None:
    plan = Hardening(order, 0.2, 0.5, layers=4, steps=10)
    soft = [plan.soft_layers(step) for step in range(11)]
    assert soft[:2] == [[0, 1, 2, 3]] * 2
    assert soft[3] == soft_at_3
    assert soft[5:] == [[]] * 6
    assert all(set(after) <= set(before) for before, after in itertools.pairwise(soft))
    if order != "all":
        assert [len(places) for places in soft] == [4, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.0), (1.0, 1.0), (0.1, 1.0)])
def test_every_layer_is_hard_at_the_end_of_the_run(start: float, end: float) -> None:
    plan = Hardening("bottom_up", start, end, layers=6, steps=7)
    assert plan.soft_layers(7) == []
    assert bool(plan.soft_layers(0)) == (start > 0)
    assert Hardening("top_down", 0.5, 0.5, layers=1, steps=4).soft_layers(2) == []


def test_a_step_decides_whatever_came_before() -> None:
    model = build("bert")
    args = FinetuneArguments(**FILES, **TOP_DOWN)
    control = control_attention(model, args, attention_config(args), 10)
    for step, expected in ((0, [False, False]), (9, [True, True]), (3, [False, True]), (0, [False, False])):
        control.set_step(step)
        assert hard_layers(model) == expected, step


def test_evaluation_is_as_hard_as_training_or_as_the_mode_says() -> None:
    model = build("bert").eval()
    args = FinetuneArguments(**FILES, **TOP_DOWN, noise="none")
    control = control_attention(model, args, attention_config(args), 10)
    control.set_step(3)

    def in_mode(mode: str) -> torch.Tensor:
        with control.evaluating(evaluation_mode(mode)):
            result: torch.Tensor = logits(model)
        return result

    def by_hand(hard: list[int]) -> torch.Tensor:
        other = build("bert").eval()
        patch = ga.patch_model(other, ga.GumbelAttentionConfig(noise="none"))
        patch.hard(True, layers=hard)
        result: torch.Tensor = logits(other)
        return result

    assert torch.equal(in_mode("noise_off"), by_hand([1]))
    assert torch.equal(in_mode("hard"), by_hand([0, 1]))
    assert torch.equal(in_mode("soft"), by_hand([]))
    assert not torch.equal(in_mode("noise_off"), in_mode("hard"))
    assert hard_layers(model) == [False, True]
    control.set_step(10)
    assert torch.equal(in_mode("noise_off"), by_hand([0, 1]))


def test_a_run_hardens_by_optimiser_step_and_its_saved_model_is_hard(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[bool]] = []

    def spying(model: Any, *args: Any) -> Any:
        control = control_attention(model, *args)

        def keep(module: Any, _: Any) -> None:
            if module.training:
                seen.append(hard_layers(module))

        model.register_forward_pre_hook(keep)
        return control

    monkeypatch.setattr(run_module, "control_attention", spying)
    changes = {**TOP_DOWN, "harden_start": 0.25, "harden_end": 0.75, "gradient_accumulation_steps": 2}
    record = run(settings, **changes, save_model=True, eval_modes=("noise_off", "hard"), num_train_epochs=2)
    soft, half, hard = [False, False], [False, True], [True, True]
    assert seen == [soft, soft, half, half, half, hard]  # two, two, one; two batches a step, one at an epoch's end
    assert record.final["noise_off"] == record.final["hard"]
    saved = ga.from_pretrained(AutoModelForSequenceClassification, Path(settings["output_dir"], "model"))
    assert hard_layers(saved) == hard


def test_a_resumed_run_hardens_as_the_one_that_was_not_stopped(settings: dict[str, Any]) -> None:
    changes = {**TOP_DOWN, "checkpointing_steps": 2, "keep_last": None}
    whole = run(settings, **changes)
    (Path(settings["output_dir"]) / "results.json").unlink()
    checkpoint = next(Path(settings["output_dir"]).glob("checkpoint-*2"))
    resumed = run(settings, **changes, overwrite_output_dir=False, resume_from_checkpoint=str(checkpoint))
    assert resumed.resumed_at == [2]
    assert resumed.train == whole.train
    assert resumed.final == whole.final
    other = run(settings, **{**changes, "harden": "bottom_up"})
    assert other.train[:2] == whole.train[:2]
    assert other.train != whole.train


def test_layers_of_the_library_are_not_hardened() -> None:
    args = FinetuneArguments(**FILES, **TOP_DOWN)
    with pytest.raises(UsageError, match="harden is for the layers of a patched model"):
        control_attention(torch.nn.Sequential(ga.GumbelSetAttention(8, 2)), args, attention_config(args), 10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hard": False}, "needs attention: gumbel, hard: true"),
        ({"eval_hard": True}, "no eval_hard"),
        ({"attention": "unpatched"}, "needs attention: gumbel"),
        ({"harden_end": None}, "harden_end is for top_down and bottom_up"),
        ({"harden": "all"}, "harden_end is for top_down and bottom_up"),
        ({"harden_end": 0.1}, "lies before"),
        ({"harden_end": 1.5}, r"harden_end must be in \[0, 1\]"),
        ({"harden": "none"}, "belong to a harden"),
    ],
)
def test_settings_that_say_nothing_or_contradict_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FinetuneArguments(**FILES, **{**TOP_DOWN, **changes})


def test_fixed_keys_see_only_visible_keys_and_keep_their_share() -> None:
    visible = torch.zeros(2, 3, 5, 8, dtype=torch.bool)
    visible[0, ..., :4] = True
    visible[1, ..., 2:] = True  # left padding
    shares = torch.rand(3, 5)
    assert torch.equal(chosen_keys("first", visible), torch.tensor([0, 2])[:, None, None].expand(2, 3, 5))
    drawn = chosen_keys("random", visible, shares)
    assert torch.equal(drawn[0], (shares * 4).long())
    assert torch.equal(drawn[1], 2 + (shares * 6).long())
    assert chosen_keys("own", visible)[1, 2].tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("kind", ["first", "own", "random"])
def test_fixed_heads_attend_to_their_key_whatever_the_input(kind: str) -> None:
    model = build("bert").eval()
    before = logits(model)
    fix_keys(model, kind)
    ids = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    found = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    other = model(input_ids=ids.flip(0), attention_mask=mask, output_attentions=True).attentions
    keys = torch.stack([weights.argmax(-1) for weights in found])  # (layers, B, H, Lq)
    assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
    assert not torch.equal(logits(model), before)
    assert all(weights.sum(-1).eq(1).all() for weights in found)
    if kind == "first":
        assert keys.unique().tolist() == [0]
    elif kind == "own":
        assert torch.equal(keys, torch.arange(6).expand_as(keys))
    else:
        assert keys[:, 1].max() < 4
        assert len({tuple(head.tolist()) for head in keys[:, 0].flatten(0, 1)}) > 1, "heads share their keys"
        fix_keys(model, kind, seed=1)
        drawn = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
        assert not all(torch.equal(a, b) for a, b in zip(found, drawn, strict=True))


def test_fixed_keys_train_and_are_evaluated_once(settings: dict[str, Any]) -> None:
    fixed = run(settings, attention="unpatched", fixed_keys="first")
    free = run(settings, attention="unpatched")
    assert list(fixed.final) == ["noise_off"]
    assert fixed.train != free.train
    for wrong in ({"fixed_keys": "own"}, {"fixed_keys": "own", "attention": "unpatched", "save_model": True}):
        with pytest.raises(UsageError, match="fixed_keys=own needs"):
            FinetuneArguments(**FILES, **wrong)
