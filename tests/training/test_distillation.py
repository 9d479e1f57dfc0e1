"""Learning from a teacher: the loss, what the teacher may be, and whole runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import run, sentences, write_rows
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import finetune
import gumbel_attention as ga
from harness import distillation, models
from harness.arguments import FinetuneArguments
from harness.distillation import Distillation, distance, divergence, load_teacher
from harness.errors import UsageError

FILES: dict[str, Any] = {"train_file": "a.tsv", "validation_file": "b.tsv"}


@pytest.fixture
def teacher(settings: dict[str, Any], tmp_path: Path) -> str:
    """The model of a finished run with soft attention."""
    run(settings, noise="none", save_model=True, output_dir=str(tmp_path / "teacher"))
    return str(tmp_path / "teacher" / "model")


def test_divergence_is_that_of_the_probabilities_at_the_temperature() -> None:
    logits, target = torch.tensor([[0.0, 3.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    p = 1 / (1 + math.exp(-1.0))  # of logits (2, 0) / 2
    q = 1 / (1 + math.exp(1.5))
    expected = 4.0 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert divergence(logits, target, 2.0).tolist() == pytest.approx([expected, 0.0], rel=1e-5, abs=1e-6)
    assert divergence(target, target, 0.5).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_distance_leaves_out_padding_and_is_relative_to_the_teacher() -> None:
    theirs = torch.full((2, 3, 4), 2.0)
    ours = theirs + torch.tensor([1.0, 0.5, 100.0])[:, None]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    first, second = (1.0 + 0.25) / 8.0, 1.0 / 4.0
    expected = ((first + second) / 2 + 0.0) / 2
    assert distance((ours, theirs), (theirs, theirs), mask).item() == pytest.approx(expected)


def test_weight_shares_the_loss_between_labels_and_teacher(settings: dict[str, Any], teacher: str) -> None:
    tokenizer = models.load_tokenizer(settings["model_name_or_path"])
    master = load_teacher(teacher, ["0", "1"], tokenizer)
    torch.manual_seed(3)
    student = models.load_classifier(settings["model_name_or_path"], ["0", "1"], 0).eval()
    ids = torch.tensor([[2, 5, 7, 3], [2, 6, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([0, 1])}

    def loss(weight: float, hidden: float = 0.0) -> Tensor:
        return Distillation(master, weight, 2.0, hidden).loss(student, inputs)

    labels = student(**inputs).loss
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    answers = divergence(student(**asked).logits, master(**asked).logits, 2.0).mean()
    torch.testing.assert_close(loss(0.0), labels)
    torch.testing.assert_close(loss(1.0), answers)
    torch.testing.assert_close(loss(0.25), 0.75 * labels + 0.25 * answers)
    assert loss(0.0, hidden=2.0) > labels
    loss(0.5, hidden=1.0).backward()
    assert all(parameter.grad is not None for parameter in student.bert.encoder.parameters())
    assert all(parameter.grad is None for parameter in master.parameters())
    assert Distillation(master, 1.0, 2.0, 1.0).loss(master, inputs).item() == pytest.approx(0.0, abs=1e-6)


def test_spliced_texts_learn_from_the_teacher_alone_and_only_in_training(
    settings: dict[str, Any], teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    master = load_teacher(teacher, ["0", "1"], models.load_tokenizer(settings["model_name_or_path"]))
    torch.manual_seed(3)
    student = models.load_classifier(settings["model_name_or_path"], ["0", "1"], 0, disable_dropout=True).train()
    inputs = {"input_ids": torch.tensor([[2, 5, 7, 3], [2, 6, 8, 3], [2, 9, 7, 3]]), "labels": torch.tensor([0, 1, 1])}
    made = torch.tensor([[2, 5, 8, 3]])

    def replaced(given: dict[str, Tensor], share: float, pad_token_id: int) -> tuple[dict[str, Tensor], Tensor]:
        assert (share, pad_token_id) == (0.5, 7)
        ids = torch.cat([made, given["input_ids"][1:]])
        return given | {"input_ids": ids}, torch.tensor([True, False, False])

    monkeypatch.setattr(distillation, "splice", replaced)
    loss = Distillation(master, 0.25, 2.0, 0.0, 0.5, 7).loss
    ids = torch.cat([made, inputs["input_ids"][1:]])
    found = student(input_ids=ids).logits
    answers = divergence(found, master(input_ids=ids).logits, 2.0)
    labels = torch.nn.functional.cross_entropy(found[1:], inputs["labels"][1:], reduction="none")
    expected = (answers[0] + (0.75 * labels + 0.25 * answers[1:]).sum()) / 3
    torch.testing.assert_close(loss(student, inputs), expected)
    plain = Distillation(master, 0.25, 2.0).loss(student, inputs)
    assert loss(student, inputs) != plain
    torch.testing.assert_close(loss(student.eval(), inputs), plain)


def test_a_run_learns_from_its_teacher_and_starts_as_without(settings: dict[str, Any], teacher: str) -> None:
    plain = run(settings)
    taught = run(settings, distill_from=teacher, distill_hidden=1.0)
    assert taught.train != plain.train
    assert run(settings, distill_from=teacher, distill_hidden=1.0).train == taught.train
    spliced = run(settings, distill_from=teacher, distill_hidden=1.0, distill_spliced=0.5)
    assert spliced.train != taught.train
    assert run(settings, distill_from=teacher, distill_hidden=1.0, distill_spliced=0.5).train == spliced.train
    labels_alone = run(settings, distill_from=teacher, distill_weight=0.0, distill_hidden=1e-30)
    assert labels_alone.train[0]["loss"] == pytest.approx(plain.train[0]["loss"], abs=1e-6), "noise or data moved"


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_the_teacher_runs_in_the_precision_of_the_run(
    settings: dict[str, Any], teacher: str, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    found = []

    def loaded(*args: Any) -> torch.nn.Module:
        master = load_teacher(*args)
        master.get_submodule("bert.pooler.dense").register_forward_hook(
            lambda _, given, output: found.append(output.dtype)
        )
        return master

    monkeypatch.setattr(finetune, "load_teacher", loaded)
    AcceleratorState._reset_state(reset_partial_state=True)  # the teacher was trained in float32
    run(settings, distill_from=teacher, mixed_precision=precision)
    assert set(found) == {dtype}


def test_a_run_goes_on_with_the_teacher_it_had(settings: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    changes = {"distill_from": teacher, "checkpointing_steps": 2, "keep_last": None}
    whole = run(settings, **changes)
    folder = Path(settings["output_dir"])
    (folder / "results.json").unlink()
    checkpoint = str(next(folder.glob("checkpoint-*2")))
    again = {**changes, "overwrite_output_dir": False, "resume_from_checkpoint": checkpoint}
    assert run(settings, **again).train == whole.train
    (folder / "results.json").unlink()
    run(settings, noise="none", save_model=True, seed=1, output_dir=str(tmp_path / "teacher"))
    with pytest.raises(UsageError, match="teacher_sha256"):
        run(settings, **again)


def test_a_teacher_keeps_its_attention_and_has_no_noise(settings: dict[str, Any], tmp_path: Path) -> None:
    hard = {"hard": True, "tau": 0.3, "eval_noise": True, "save_model": True, "output_dir": str(tmp_path / "hard")}
    run(settings, **hard)
    folder = str(tmp_path / "hard" / "model")
    loaded: Any = load_teacher(folder, ["0", "1"], models.load_tokenizer(settings["model_name_or_path"]))
    ids = torch.tensor([[2, 5, 7, 9, 3]])
    state = torch.get_rng_state()
    assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert torch.equal(torch.get_rng_state(), state)
    by_hand = ga.from_pretrained(AutoModelForSequenceClassification, folder).eval()
    with ga.patch_of(by_hand).noise(False):
        assert torch.equal(loaded(input_ids=ids).logits, by_hand(input_ids=ids).logits)
    with ga.patch_of(loaded).hard(False):
        assert not torch.equal(loaded(input_ids=ids).logits, by_hand(input_ids=ids).logits)


def test_teachers_that_cannot_teach_are_refused(settings: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(UsageError, match=words):
            run(settings, **{"distill_from": teacher, **changes})

    refused("cannot be loaded", distill_from=str(tmp_path / "nowhere"))
    refused("no fine-tuned classifier.*save_model", distill_from=settings["model_name_or_path"])
    three = write_rows(tmp_path / "three.tsv", [*sentences(12), ("a film", 2)])
    refused(r"tells the labels \['0', '1'\], this data has \['0', '1', '2'\]", train_file=three)

    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["film"], vocabulary["plot"] = vocabulary["plot"], vocabulary["film"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    refused("reads other tokens", distill_from=str(other))

    wider = tmp_path / "wider"
    shutil.copytree(settings["model_name_or_path"], wider)
    bare: Any = AutoModelForSequenceClassification.from_pretrained(wider)
    bare.config.hidden_size, bare.config.num_hidden_layers = 16, 3
    type(bare)(bare.config).save_pretrained(wider)
    refused("2 layers of size 16, the model 3", model_name_or_path=str(wider), distill_hidden=1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill_weight": 1.5}, r"distill_weight must be in \[0, 1\]"),
        ({"distill_temperature": 0.0}, "distill_temperature must be > 0"),
        ({"distill_hidden": -1.0}, "distill_hidden must be >= 0"),
        ({"distill_weight": 0.0}, "needs a distill_weight or distill_hidden"),
        ({"estimator": "score_function", "hard": True}, "exclude each other"),
        ({"distill_from": None, "distill_hidden": 1.0}, "needs distill_from"),
        ({"distill_from": None, "distill_spliced": 0.5}, "distill_spliced=0.5 needs distill_from"),
        ({"distill_spliced": 1.5}, r"distill_spliced must be in \[0, 1\]"),
        ({"distill_spliced": 0.5, "fixed_noise": True}, "neither text_pair_column nor fixed_noise"),
        ({"distill_spliced": 0.5, "text_pair_column": "b"}, "neither text_pair_column nor fixed_noise"),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FinetuneArguments(**FILES, **{"distill_from": "t", **changes})
