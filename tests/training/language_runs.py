"""Short runs of language_model.py: their settings, how to start them, what they leave."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import language_model
from harness.loop import TrainingRecord
from harness.stopping import Stopped
from tasks import language_modelling
from tasks.language_arguments import LanguageModelArguments
from tasks.text_corpus import character_tokenizer, load_documents

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n\n" * 3
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}


def language_settings(folder: Path) -> dict[str, Any]:
    """A run of six steps on 264 characters, with dropout; the texts are written to ``folder``."""
    (folder / "train.txt").write_text(TEXT)
    (folder / "dev.txt").write_text("Whether to be the mind\nor not to be noble")
    return {
        "model_config": GPT2,
        "tokenizer_name": "characters",
        "train_file": str(folder / "train.txt"),
        "validation_file": str(folder / "dev.txt"),
        "block_size": 12,
        "cache_dir": str(folder / "cache"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "tau_schedule": "exponential",
        "tau_end": 0.5,
        "save_model": True,
        "output_dir": str(folder / "run"),
    }


def start(settings: dict[str, Any], **changes: Any) -> TrainingRecord:
    return language_model.run(LanguageModelArguments(**{**settings, **changes}))


def results(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return read


def stop_at_batch(number: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    count, compute_loss = [0], language_modelling.compute_loss

    def counting(model: Any, batch: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            signal.raise_signal(signal.SIGTERM)
        return compute_loss(model, batch)

    with monkeypatch.context() as patched:
        patched.setattr(language_modelling, "compute_loss", counting)
        with pytest.raises(Stopped):
            start(settings)


def stream_of(folder: Path) -> dict[str, Any]:
    """Settings of a stream of lines and of a tokenizer that was saved."""
    args = LanguageModelArguments(
        model_config=GPT2,
        tokenizer_name="characters",
        train_file=str(folder / "train.txt"),
        validation_split_percentage=1,
        cache_dir=str(folder / "cache"),
    )
    character_tokenizer(load_documents(args)[0]).save_pretrained(folder / "tokenizer")
    return {"streaming": True, "tokenizer_name": str(folder / "tokenizer"), "sample_by": "line", "shuffle_buffer": 3}
