"""An optimiser step follows the mean over all its tokens, however they are divided into batches and processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import seen_gradients

import transduction
from forked import run_in_two
from tasks.transduction import TransductionArguments

TOLERANCE = 1e-6


@pytest.fixture
def uneven(tmp_path: Path) -> dict[str, Any]:
    """Forms of 2 to 40 symbols; 20 of them, so that the last step of an epoch has fewer; no noise, no dropout."""
    lemmas = ["ab" * (1 + 19 * (number % 2)) + "cdefghij"[number % 8] for number in range(20)]
    (tmp_path / "words").write_text("".join(f"{lemma}\t{lemma}\tV\n" for lemma in lemmas))
    files = {"train_file": str(tmp_path / "words"), "validation_file": str(tmp_path / "words")}
    sizes = {"width": 16, "num_heads": 2, "dropout": 0.0, "noise": "none", "max_grad_norm": 0.0}
    return files | sizes | {"num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 1, "eval_steps": 100}


def steps(settings: dict[str, Any], folder: Path, **changes: Any) -> tuple[list[float], list[torch.Tensor]]:
    """The losses and gradients of the optimiser steps of a run."""
    with seen_gradients() as seen:
        record = transduction.run(TransductionArguments(**settings, **changes, output_dir=str(folder)))
    return [entry["loss"] for entry in record.train], seen


@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1, "hard": True}])
def test_accumulated_batches_are_the_mean_over_their_tokens(
    uneven: dict[str, Any], tmp_path: Path, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, first = steps(uneven | extra, tmp_path / "one", per_device_train_batch_size=8)
    for size in (4, 2, 1):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        losses, gradients = steps(uneven | extra, tmp_path / str(size), **split)
        assert losses == pytest.approx(one, abs=TOLERANCE)
        assert torch.allclose(gradients[0], first[0], rtol=0, atol=TOLERANCE)
    monkeypatch.delattr(transduction.Transduction, "weight")
    losses, gradients = steps(uneven | extra, tmp_path / "examples", **split)
    assert not torch.allclose(gradients[0], first[0], rtol=0, atol=100 * TOLERANCE), (
        "the control: weighted by examples"
    )


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(uneven: dict[str, Any], tmp_path: Path) -> None:
    one, _ = steps(uneven, tmp_path / "one", per_device_train_batch_size=8)
    for accumulation in (1, 2):
        folder = tmp_path / f"two-{accumulation}"
        given = {**uneven, "per_device_train_batch_size": 4 // accumulation, "output_dir": str(folder)}
        line = [f"--{key}={value}" for key, value in given.items()]
        line.append(f"--gradient_accumulation_steps={accumulation}")
        run_in_two(transduction.main, line, log=tmp_path / f"{folder.name}.log")
        series = json.loads((folder / "results.json").read_text())["series"]["train"]
        assert [entry["loss"] for entry in series] == pytest.approx(one, abs=TOLERANCE)
