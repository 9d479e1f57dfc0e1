"""The README's samples of Python run as they stand, one after another, on a tiny model of the name that they load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import gumbel_attention as ga

README = Path(__file__).parents[1] / "README.md"
SAMPLES = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=32, max_position_embeddings=32))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, in which the hub name of the first sample is a model."""
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained("bert-base-uncased")
    return tmp_path


def names() -> dict[str, Any]:
    """What the samples take for granted."""
    ids = torch.arange(1, 13).reshape(2, 6)
    labels = torch.tensor([0, 1])
    arguments = transformers.TrainingArguments("run", max_steps=2, report_to=[], use_cpu=True)
    return {
        "ga": ga,
        "F": F,
        "torch": torch,
        "transformers": transformers,
        "batch": {"input_ids": ids},
        "inputs": {"input_ids": ids},
        "labels": labels,
        "args": arguments,
        "data": [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)],
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
    }


def test_the_samples_are_those_known_here() -> None:
    first_words = [sample.split("\n")[0] for sample in SAMPLES]
    assert len(first_words) == 4, f"a sample came or went: {first_words}"


@pytest.mark.filterwarnings("ignore:this configuration was saved by a model with Gumbel attention")  # of the two steps
def test_the_first_sample_then_saving_restoring_and_training(here: Path) -> None:
    known = names()
    exec(SAMPLES[0], known)
    model = known["model"]
    assert isinstance(model, nn.Module)
    assert model.training, "else there is no noise"
    assert not any("gumbel" in name for name, _ in model.named_modules()), "the patch is gone"
    known["patch"] = ga.patch_model(model, known["config"])
    exec(SAMPLES[1], known)
    assert {float(tau) for tau in ga.patch_of(known["model"]).tau} == {0.5}
    assert known["prediction"].votes.shape == (2, 2)
    known["trainer"].train()
    assert ga.patch_of(known["model"]).tau[0].item() == pytest.approx(2.0, rel=0.01), "two steps of a thousand"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")  # PEFT asks for it
def test_the_sample_with_peft(here: Path) -> None:
    peft = pytest.importorskip("peft")
    known = names() | {"base": tiny(), "config": ga.GumbelAttentionConfig(hard=True), "folder": str(here / "adapter")}
    known["get_peft_model"], known["PeftModel"] = peft.get_peft_model, peft.PeftModel
    known["LoraConfig"] = lambda _: peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS")
    save, load = SAMPLES[2].split("\n\n")
    exec(save, known)
    saved = known["model"].eval()(**known["inputs"]).logits
    known["patch"].set_tau(3.0)
    known["base"] = tiny()
    exec(load, known)
    assert {float(tau) for tau in ga.patch_of(known["model"]).tau} == {1.0}
    assert torch.equal(known["model"].eval()(**known["inputs"]).logits, saved)


def test_the_sample_of_the_score_function() -> None:
    known = names() | {"model": tiny().eval()}
    exec(SAMPLES[3], known)
    assert all(parameter.grad is not None for parameter in known["model"].classifier.parameters())
    gradient = known["model"].bert.encoder.layer[0].attention.self.query.weight.grad
    assert gradient.abs().max() > 0, "by the probability of the choices"
