"""finetune.py end to end: results, repeatability, equal data across arms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import run

import finetune
from harness import models
from harness import run as run_module
from harness.arguments import FinetuneArguments
from harness.attention import control_attention
from harness.errors import UsageError
from harness.results import read_results
from harness.run import run_task


def test_run_leaves_configuration_and_complete_results(settings: dict[str, Any]) -> None:
    words = [f"--{key}={value}" for key, value in settings.items()]
    finetune.main([*words, "--tau_schedule", "linear", "--tau_end", "0.4", "--hard"])
    folder = Path(settings["output_dir"])
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "results.json"]
    results = read_results(folder)
    assert results is not None
    assert set(results) == {
        *("schema_version", "status", "started", "config", "label_names", "final", "series", "steps", "git"),
        *("train_seconds", "eval_seconds", "steps_per_second", "peak_memory_bytes", "device", "num_processes"),
        *("num_threads", "versions", "resumed_at_steps", "tokens", "tokens_per_second"),
    }
    assert results["config"] == yaml.safe_load((folder / "config.yaml").read_text())
    assert set(results["final"]) == {"noise_off", "noise_on"}
    names = {"loss", "accuracy", "f1_macro", "calibration_error", "selective_accuracy"}
    assert all(set(metrics) == names for metrics in results["final"].values())
    train, evaluation = results["series"]["train"], results["series"]["evaluation"]
    assert [entry["step"] for entry in train] == [1, 2, 3, 4, 5, 6]
    assert [entry["tau"] for entry in train] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert [(entry["step"], entry["mode"]) for entry in evaluation] == [
        *((3, "noise_off"), (3, "noise_on"), (6, "noise_off"), (6, "noise_on"))
    ]
    assert [entry["tau"] for entry in evaluation] == pytest.approx([0.7, 0.7, 0.4, 0.4])
    assert evaluation[-1]["epoch"] == 2.0
    assert train[0]["learning_rate"] == pytest.approx(1e-3)


def test_layers_run_at_the_scheduled_temperature(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, float]] = []

    def spying(model: Any, *args: Any) -> Any:
        control = control_attention(model, *args)

        def keep(module: Any, _: Any) -> None:
            seen.append((module.training, control.patch.tau[-1].item()))

        model.register_forward_pre_hook(keep)
        return control

    monkeypatch.setattr(run_module, "control_attention", spying)
    run(settings, tau_schedule="linear", tau_end=0.4, gradient_accumulation_steps=2, eval_steps=4)
    assert [tau for training, tau in seen if training] == pytest.approx([1.0, 1.0, 0.85, 0.7, 0.7, 0.55])
    assert {round(tau, 6) for training, tau in seen if not training} == {0.4}


def test_the_clipped_exponential_schedule_reaches_the_run(settings: dict[str, Any]) -> None:
    record = run(settings, tau_schedule="clipped_exponential", tau_end=0.5, tau_rate=0.2, tau_every=2)
    expected = [max(0.5, math.exp(-0.2 * step)) for step in (0, 0, 2, 2, 4, 4)]
    assert [entry["tau"] for entry in record.train] == pytest.approx(expected)


def test_finished_run_is_kept_unless_told_otherwise(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings, max_train_steps=1)
    words = [f"--{key}={value}" for key, value in settings.items()]
    with pytest.raises(SystemExit) as stopped:
        finetune.main(words)
    assert stopped.value.code == 2
    assert "holds a finished run: choose another" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no such file"):
        run(settings, train_file="missing.tsv")
    assert read_results(Path(settings["output_dir"])) is None, "a run that was to be replaced is no longer finished"


def test_same_seed_gives_the_same_series(settings: dict[str, Any]) -> None:
    first, second, other = run(settings), run(settings), run(settings, seed=1)
    assert first.train == second.train
    assert first.evaluation == second.evaluation
    assert first.train != other.train


def test_evaluation_leaves_the_training_series_unchanged(settings: dict[str, Any]) -> None:
    once, often = run(settings, eval_steps=6), run(settings, eval_steps=1)
    assert len(often.evaluation) == 12
    assert once.train == often.train
    assert once.final == often.final


def test_both_modes_differ_and_a_noiseless_arm_gets_gumbel_noise(settings: dict[str, Any]) -> None:
    for noise in ("none", "normal", "gumbel"):
        final = run(settings, noise=noise, hard=True).final
        assert final["noise_off"]["loss"] != final["noise_on"]["loss"]


def test_unpatched_model_is_evaluated_once(settings: dict[str, Any]) -> None:
    record = run(settings, attention="unpatched")
    assert list(record.final) == ["noise_off"]
    assert {entry["tau"] for entry in record.train + record.evaluation} == {None}


def test_plain_temperature_one_is_the_unpatched_model(settings: dict[str, Any]) -> None:
    """Also says that all arms start from the same head and see the same batches."""
    patched = run(settings, disable_dropout=True, noise="none")
    unpatched = run(settings, disable_dropout=True, attention="unpatched")
    losses = [[entry["loss"] for entry in record.train] for record in (patched, unpatched)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_data_order_and_head_are_equal_across_arms(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: list[torch.Tensor] = []
    load = finetune.load_classifier

    def spying(*args: Any) -> Any:
        model = load(*args)
        tensors.append(model.classifier.weight.detach().clone())

        def keep(module: Any, _: Any, kwargs: dict[str, Any]) -> None:
            if module.training:
                tensors.append(kwargs["input_ids"])

        model.register_forward_pre_hook(keep, with_kwargs=True)
        return model

    monkeypatch.setattr(finetune, "load_classifier", spying)

    def seen(**changes: Any) -> list[torch.Tensor]:
        tensors.clear()
        run(settings, **changes)
        return list(tensors)

    soft = seen(noise="gumbel")
    assert len(soft) == 7
    assert not all(map(torch.equal, soft[1:4], soft[4:])), "every epoch has an order of its own"
    for arm in (seen(noise="gumbel", hard=True, eval_steps=1), seen(attention="unpatched")):
        assert all(torch.equal(a, b) for a, b in zip(soft, arm, strict=True))
    other = seen(seed=5)
    assert not torch.equal(soft[0], other[0])
    assert not all(map(torch.equal, soft[1:], other[1:]))


def test_accumulated_batches_are_one_step(settings: dict[str, Any]) -> None:
    record = run(settings, gradient_accumulation_steps=2, tau_schedule="linear", tau_end=0.5)
    assert record.steps == 4
    assert [entry["tau"] for entry in record.train] == pytest.approx([1.0, 0.875, 0.75, 0.625])
    rates = [entry["learning_rate"] for entry in record.train]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [entry["step"] for entry in record.evaluation] == [2, 2, 4, 4]


def test_mixed_precision_checkpointing_and_learned_temperature(settings: dict[str, Any]) -> None:
    record = run(
        settings, mixed_precision="bf16", gradient_checkpointing=True, learn_tau="head", warmup_ratio=0.5, tau=0.9
    )
    taus = [entry["tau"] for entry in record.train]
    assert taus[0] == pytest.approx(0.9)
    assert taus[-1] != pytest.approx(0.9, abs=1e-6)
    assert record.train[0]["learning_rate"] == 0.0


def test_checkpointing_repeats_the_noise(settings: dict[str, Any]) -> None:
    plain, recomputed = run(settings), run(settings, gradient_checkpointing=True)
    assert [entry["loss"] for entry in recomputed.train] == pytest.approx(
        [entry["loss"] for entry in plain.train], abs=1e-5
    )


def test_diverged_run_does_not_finish(settings: dict[str, Any]) -> None:
    with pytest.raises(FloatingPointError, match=r"the training loss is nan at step .*lower learning_rate"):
        run(settings, learning_rate=1e30, max_grad_norm=0.0, attention="unpatched")
    assert read_results(Path(settings["output_dir"])) is None


def test_saved_model_can_be_loaded(settings: dict[str, Any]) -> None:
    run(settings, save_model=True, max_train_steps=1, attention="unpatched")
    folder = str(Path(settings["output_dir"]) / "model")
    model = models.load_classifier(folder, ["0", "1"], 0)
    assert model.config.id2label == {0: "0", 1: "1"}
    assert models.load_tokenizer(folder).pad_token_id == 0


@pytest.mark.parametrize("baseline", ["none", "soft"])
def test_the_score_function_trains_the_scores(
    settings: dict[str, Any], baseline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-probabilities give the last layer's query projection a gradient; the plain loss gives it none."""
    sampled_loss, lengths = finetune.sampled_loss, []

    def spying(losses_of: Any, model: Any, batch: Any, given: str) -> torch.Tensor:
        assert given == baseline
        queries = [p for name, p in model.named_parameters() if name.endswith("query.weight")][-1:]
        both = sampled_loss(losses_of, model, batch, given), losses_of(model, batch).mean()
        lengths.extend(torch.autograd.grad(loss, queries)[0].norm().item() for loss in both)
        return sampled_loss(losses_of, model, batch, given)

    monkeypatch.setattr(finetune, "sampled_loss", spying)
    record = run(settings, hard=True, estimator="score_function", baseline=baseline, max_train_steps=1)
    assert math.isfinite(record.train[-1]["loss"])
    assert lengths[0] > 0.0 == lengths[1]


def test_a_task_without_losses_of_examples_refuses_the_score_function(settings: dict[str, Any]) -> None:
    args = FinetuneArguments(**settings, hard=True, estimator="score_function")
    task = finetune.Classification(args)
    task.samples_loss = False  # type: ignore[misc]  # as tasks that do not have it
    with pytest.raises(UsageError, match="needs a loss for each example"):
        run_task(args, task)
