"""The model card: metadata that the hub reads, numbers of the run, a call that works, no path of the machine."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import run

import finetune
import gumbel_attention as ga
import language_model
import story_qa
import transduction
from harness.arguments import FinetuneArguments
from harness.model_card import arm_of, base_model, without_machine
from harness.parsing import from_mapping
from tasks.language_arguments import LanguageModelArguments
from tasks.story_answering import StoryArguments
from tasks.transduction import TransductionArguments


def language(folder: Path) -> Any:
    (folder / "text.txt").write_text("To be, or not to be: that is the question.\n" * 9)
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}
    settings = {"model_config": gpt2, "tokenizer_name": "characters", "block_size": 12, "cache_dir": str(folder / "c")}
    texts = {"train_file": str(folder / "text.txt"), "validation_file": str(folder / "text.txt")}
    return settings | texts, language_model.run, LanguageModelArguments


def inflection(folder: Path) -> Any:
    (folder / "words").write_text("ab\tabs\tV;3\nbad\tbads\tV;3\ncab\tcabbed\tV;PST\n")
    settings = {"train_file": str(folder / "words"), "validation_file": str(folder / "words"), "width": 16}
    return settings, transduction.run, TransductionArguments


def stories(folder: Path) -> Any:
    return {"train_stories": 30, "validation_stories": 7}, story_qa.run, StoryArguments


SCRIPTS: dict[str, tuple[Callable[[Path], Any], str, str | None, str]] = {
    "finetune": (lambda folder: None, "transformers", "text-classification", "bert.encoder.layer.1.attention.self"),
    "language_model": (language, "transformers", "text-generation", "transformer.h.1.attn"),
    "transduction": (inflection, "transformers", None, "model.decoder.layers.0.encoder_attn"),
    "story_qa": (stories, "pytorch", None, "attention.0"),
}


def loaded_by(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the Python of a card defines, run beside the model's folder."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():  # AutoTokenizer reads the model's configuration, which cannot know for what
        warnings.filterwarnings("ignore", message="this configuration was saved by a model with Gumbel attention")
        exec(code, names)
    return names


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_card_of_every_script(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    make, library, pipeline, layer = SCRIPTS[script]
    own, start, kind = make(tmp_path) or (settings, finetune.run, FinetuneArguments)
    changes = {"hard": True, "tau_schedule": "linear", "tau_end": 0.25, "max_train_steps": 2, "save_model": True}
    start(from_mapping(kind, own | changes | {"output_dir": str(tmp_path / "run")}, "here"))
    card = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    metadata = card.data.to_dict()
    assert metadata["library_name"] == library
    assert metadata.get("pipeline_tag") == pipeline
    assert metadata["tags"] == ["gumbel-attention", "gumbel-st"]
    assert "base_model" not in metadata, "a folder is no name on the hub"
    assert set(metadata["metrics"]) == set(results["final"]["noise_off"]) - {"loss"}
    measured = {(each.metric_type, each.metric_name): each.metric_value for each in card.data.eval_results}
    for mode, name in (("noise_off", "noise off"), ("noise_on", "noise on")):
        for metric, value in results["final"][mode].items():
            assert measured[metric, f"{metric}, {name}"] == value
            assert f"{value:.4f}" in next(line for line in card.text.splitlines() if line.startswith(f"| {name} "))
    assert layer in next(line for line in card.text.splitlines() if line.startswith("| layers "))
    assert "| tau | linear, from 1 to 0.25, which the saved model has |" in card.text
    assert "| noise in training | gumbel, times 1 |" in card.text
    assert f"| torch | {torch.__version__} |" in card.text
    assert "| `tau_end` | `0.25` |" in card.text
    assert "output_dir" not in card.content
    assert str(tmp_path) not in card.content
    assert not re.search(r"/(tmp|home|root|work)\b", card.content)
    names = loaded_by(card.text, tmp_path / "run", monkeypatch)
    patch = ga.patch_of(names["model"]) if library == "transformers" else None
    tau = patch.tau[0] if patch is not None else names["model"].attention[0].gumbel.tau
    assert tau.item() == pytest.approx(0.25)
    assert not names["model"].training


def test_the_card_of_an_unpatched_model_loads_it_plainly(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings, attention="unpatched", save_model=True, max_train_steps=1)
    card = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    assert card.data.tags == ["unpatched"]
    assert "gumbel_attention." not in card.text
    assert (
        type(loaded_by(card.text, tmp_path / "run", monkeypatch)["model"]).__name__ == "BertForSequenceClassification"
    )


def test_learned_temperatures_and_selected_heads_are_told(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings, save_model=True, max_train_steps=2, learn_tau="head", heads=(1,), layers=(0,), noise="none")
    text = ModelCard.load(tmp_path / "run" / "model" / "README.md").text
    assert re.search(r"\| tau \| learned per head, from 1; \d\.\d+ in the mean at the end \|", text)
    assert "| heads | 1 |" in text
    assert "| layers | `bert.encoder.layer.0.attention.self` |" in text
    assert "| arm | softmax-tau |" in text


def test_no_card_without_a_model(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings, max_train_steps=1)
    assert not list((tmp_path / "run").rglob("README.md"))


@pytest.mark.parametrize(
    ("changes", "arm"),
    [
        ({"noise": "none"}, "softmax-tau"),
        ({}, "gumbel-soft"),
        ({"hard": True}, "gumbel-st"),
        ({"hard": True, "noise": "none"}, "det-st"),
        ({"hard": True, "noise": "normal"}, "normal-st"),
        ({"hard": True, "estimator": "score_function"}, "reinforce"),
        ({"hard": True, "estimator": "gumbel_rao"}, "gumbel-gumbel_rao"),
        ({"attention": "unpatched", "hard": True}, "unpatched"),
    ],
)
def test_arms(changes: dict[str, Any], arm: str) -> None:
    assert arm_of(FinetuneArguments(train_file="a.tsv", validation_file="b.tsv", **changes)) == arm


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("bert-base-uncased", "bert-base-uncased"),
        ("google/bert_uncased_L-2", "google/bert_uncased_L-2"),
        ("minilm", "sentence-transformers/all-MiniLM-L6-v2"),
        ("scratch", None),
        (None, None),
        ("/models/bert", None),
        ("./bert", None),
        ("../models/bert", None),
        ("a/b/c", None),
        ("{tmp}", None),
    ],
)
def test_base_models_are_names_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert base_model(given.replace("{tmp}", "here") if given else given) == expected


def test_paths_lose_their_folders() -> None:
    given = {"a": "/data/x/train.tsv", "b": ["C:\\data\\x.tsv", "~/y.tsv", "data/z.tsv", 3], "c": "bert/base"}
    assert without_machine(given) == {"a": "train.tsv", "b": ["x.tsv", "y.tsv", "data/z.tsv", 3], "c": "bert/base"}
