"""Scores that learn which key to read in the average's place, and values worth reading alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import run
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel

import gumbel_attention as ga
from gumbel_attention.arguments import attention_problem
from harness.arguments import FinetuneArguments
from harness.choice_transfer import (
    Transfer,
    _averages,
    _nearest,
    _scores,
    _values,
    choice_loss,
    freeze_choices,
    transfer_choices,
)
from harness.errors import UsageError
from models import build


def problem(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None = None) -> Any:
    return attention_problem(query, key, value, keep, 0.0, False, 1.0, False, noise="none")


def batches(rows: int = 6, length: int = 7) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (4, rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 0, 4:] = 0
    return [{"input_ids": i, "attention_mask": m, "labels": torch.zeros(rows)} for i, m in zip(ids, mask, strict=True)]


def test_the_nearest_value_is_the_target_not_that_of_the_largest_weight() -> None:
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 0.9, 0.0]).view(1, 1, 3, 1)
    value = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.5, 0.5]]).view(1, 1, 3, 2)
    scores = torch.tensor([1.0, 0.9, 0.0])
    average = scores.softmax(0) @ value[0, 0]
    theirs = problem(query, key, value)
    averages, counted = _averages(theirs)
    torch.testing.assert_close(averages[0, 0, 0], average)
    assert counted.all()
    assert _nearest(averages, _scores(theirs), _values(theirs)) == 2, "the control: key 0 has the largest"
    found = choice_loss(theirs, theirs)
    error = (value[0, 0, 0] - average).square().sum() / average.square().sum()
    torch.testing.assert_close(found, -scores.log_softmax(0)[2] + error)


def test_the_value_read_is_drawn_to_the_average_and_no_other() -> None:
    """The gradient of the error: 2 (v - u) / |u|^2 where the argmax reads, 0 elsewhere; none reaches the copy."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4).unbind()
    copy, own = value.clone().requires_grad_(), value.clone().requires_grad_()
    theirs = problem(query, key, copy)
    choice_loss(problem(query, key, own), theirs).backward()
    averages, _ = _averages(theirs)
    chosen = nn.functional.one_hot(_scores(theirs).argmax(-1), 5).to(value)
    expected = 2.0 * chosen.mT @ (chosen @ value - averages) / averages.square().sum()
    torch.testing.assert_close(own.grad, expected)
    assert copy.grad is None
    assert (expected != 0.0).any()
    assert (expected == 0.0).all(-1).any(), "the control: some key is read by no query"


def test_hidden_keys_are_no_targets_and_padding_does_not_count() -> None:
    keep = torch.tensor([True, True, False]).view(1, 1, 1, 3)
    query = torch.randn(1, 2, 3, 4)
    value = torch.randn(1, 2, 3, 4)
    value[:, :, 2] = torch.nan
    theirs = problem(query, query.clone(), value, keep)
    averages, counted = _averages(theirs)
    assert averages[:, :, :2].isfinite().all()
    assert _nearest(averages, _scores(theirs), _values(theirs)).max() < 2
    value[:, :, 2] = averages[:, :, 2] = 0.0
    everyone = problem(query, query.clone(), value)
    assert (_nearest(averages, _scores(everyone), _values(everyone))[..., 2] == 2).all(), "the control: not hidden"
    assert counted.tolist() == [[[True, True, False]] * 2]
    assert choice_loss(theirs, theirs).isfinite()


def test_only_what_makes_queries_keys_and_values_learns() -> None:
    model = build("bert").train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    found = transfer_choices(model, batches(), 12, 1e-2)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    kinds = {".query.", ".key.", ".value."}
    assert all(any(kind in name for kind in kinds) for name in changed)
    assert all(any(kind in name for name in changed) for kind in kinds)
    assert {name.split("layer.")[1][0] for name in changed} == {"0", "1"}
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.steps == 12
    with pytest.raises(ValueError, match="patch"):
        ga.patch_of(model)


def test_the_keys_chosen_come_closer_to_the_averages() -> None:
    one = batches(rows=16)[:1]
    found = transfer_choices(build("bert"), one, 60, 1e-2)
    for layer in range(2):
        assert found.before.least_error[layer] <= found.before.error[layer]
        assert found.after.agreement[layer] > found.before.agreement[layer] + 0.1
        assert found.after.error[layer] < found.before.error[layer]
    still = transfer_choices(build("bert"), one, 60, 1e-12)  # the control: the same without learning
    assert still.after.agreement == pytest.approx(still.before.agreement, abs=1e-3)


def test_layers_that_stay_soft_stay_as_they_are() -> None:
    model = build("bert")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = transfer_choices(model, batches(), 3, 1e-2, layers=(-1,))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split("layer.")[1][0] for name in changed} == {"1"}
    assert len(found.after.error) == 1


def test_layers_that_are_shared_or_have_sinks_are_refused() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    shared = AlbertModel(AlbertConfig(vocab_size=50, embedding_size=8, **sizes))
    for model, message in ((shared, "called 2 times"), (build("gpt_oss"), "with a sink")):
        with pytest.raises(UsageError, match=message):
            transfer_choices(model, [{"input_ids": torch.randint(5, 50, (2, 6))}], 1, 1e-3)


@pytest.mark.parametrize("name", ["llama", "distilbert"])
def test_other_architectures(name: str) -> None:
    ids = torch.randint(5, 50, (6, 9), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        found = transfer_choices(build(name).to(dtype), [{"input_ids": ids}], 30, 1e-2)
        assert all(after < before for before, after in zip(found.before.error, found.after.error, strict=True))


def test_a_run_prepares_its_scores_once(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune

    calls: list[int] = []

    def counted(*args: Any) -> Transfer:
        calls.append(1)
        return transfer_choices(*args)

    monkeypatch.setattr(finetune, "transfer_choices", counted)
    hard = settings | {"hard": True, "noise": "none", "choice_steps": 4}
    run(hard, checkpointing_steps=2, keep_last=None, save_model=True)
    known = json.loads((tmp_path / "run" / "results.json").read_text())["choice_transfer"]
    assert known["steps"] == 4
    assert len(known["after"]["error"]) == len(known["before"]["agreement"]) == 2
    whole = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    args = {**hard, "save_model": True, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": checkpoint}
    finetune.run(FinetuneArguments(**args))
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == whole
    assert calls == [1], "a checkpoint has what was prepared"
    (tmp_path / "run" / "results.json").unlink()
    finetune.run(
        FinetuneArguments(**{**args, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest"})
    )
    assert calls == [1]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["choice_transfer"] == known
    run(settings | {"hard": True, "noise": "none"}, save_model=True)
    assert not (tmp_path / "run" / "choice_transfer.json").exists(), "what an overwritten run measured goes"
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() != whole, "the control: without it"


@pytest.mark.parametrize("changes", [{"hard": False}, {"attention": "unpatched"}])
def test_a_choice_that_is_never_made_is_refused(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="choice_steps=5"):
        FinetuneArguments(**{**settings, "hard": True, "choice_steps": 5, **changes})
    for name, value in (("choice_steps", -1), ("choice_learning_rate", 0.0)):
        with pytest.raises(UsageError, match=name):
            FinetuneArguments(**{**settings, "hard": True, name: value})
    for prepared in ({"choice_steps": 5}, {"freeze_choice": True}):
        with pytest.raises(UsageError, match="they exclude heads"):
            FinetuneArguments(**{**settings, "hard": True, "heads": (0,), **prepared})


def test_frozen_choices_keep_what_makes_queries_and_keys() -> None:
    model = build("bert").train()
    state = torch.get_rng_state()
    freeze_choices(model, (-1,))
    assert torch.equal(torch.get_rng_state(), state)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split("layer.1.attention.self.")[1] for name in frozen} == {
        "query.weight", "query.bias", "key.weight", "key.bias",
    }  # fmt: skip
    assert model.training
    with pytest.raises(ValueError, match="patch"):
        ga.patch_of(model)
    with pytest.raises(UsageError, match=r"c_attn.* makes queries, keys and values together"):
        freeze_choices(build("gpt2"))


def test_a_run_with_frozen_choices(settings: dict[str, Any], tmp_path: Path) -> None:
    def weights(name: str, **changes: Any) -> dict[str, Tensor]:
        hard = settings | {"hard": True, "noise": "none", "choice_steps": 4, "save_model": True}
        run(hard, **{"output_dir": str(tmp_path / name), **changes})
        return load_file(tmp_path / name / "model" / "model.safetensors")

    short = weights("short", freeze_choice=True, max_train_steps=1)
    checkpoints = {"freeze_choice": True, "checkpointing_steps": 2, "keep_last": None}
    long = weights("long", **checkpoints)
    changed = {name for name in long if not torch.equal(long[name], short[name])}
    assert not any(".query." in name or ".key." in name for name in changed)
    assert any(".value." in name for name in changed)
    free = weights("free")
    assert any(".query." in name for name in free if not torch.equal(free[name], short[name])), "the control"
    (tmp_path / "long" / "results.json").unlink()
    goes_on = {"overwrite_output_dir": False, "resume_from_checkpoint": str(tmp_path / "long" / "checkpoint-2")}
    again = weights("long", **checkpoints, **goes_on)
    assert all(torch.equal(again[name], long[name]) for name in long), "a run that goes on keeps them, too"
    with pytest.raises(UsageError, match="freeze_choice"):
        FinetuneArguments(**{**settings, "attention": "unpatched", "freeze_choice": True})
