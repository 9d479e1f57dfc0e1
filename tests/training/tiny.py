"""A tiny classifier, tokenizer and data set, and how to run on them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import finetune
from harness import models
from harness.arguments import FinetuneArguments
from harness.loop import TrainingRecord
from tasks.classification import load_data

WORDS = ["a", "dull", "film", "fine", "null", "NA", "plot", "the", "warm", '"quoted', "weak", "with"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write_rows(path: Path, rows: list[tuple[str, Any]], header: str = "sentence\tlabel") -> str:
    path.write_text("\n".join([header, *(f"{text}\t{label}" for text, label in rows)]) + "\n")
    return str(path)


def sentences(count: int) -> list[tuple[str, int]]:
    pairs = itertools.product(("a", "the"), ("film", "plot", "film with plot"), ("fine", "dull", "warm", "weak"))
    rows = [(f"{article} {noun} {word}", int(word in ("fine", "warm"))) for article, noun, word in pairs]
    return (rows * 3)[:count]


def small_settings(model: str, folder: Path) -> dict[str, Any]:
    """Six optimiser steps of the model on 24 sentences, which are written into the folder; no output folder."""
    return {
        "model_name_or_path": model,
        "cache_dir": str(folder / "cache"),
        "train_file": write_rows(folder / "train.tsv", sentences(24)),
        "validation_file": write_rows(folder / "dev.tsv", sentences(11)),
        "max_length": 16,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }


def run(settings: dict[str, Any], **changes: Any) -> TrainingRecord:
    return finetune.run(FinetuneArguments(**{**settings, "overwrite_output_dir": True, **changes}))


def data_of(settings: dict[str, Any], **changes: Any) -> Any:
    args = FinetuneArguments(**{**settings, **changes})
    return load_data(args, models.load_tokenizer(args.model_name_or_path))
