"""Losses that are not finite, in the scripts that test_nonfinite does not run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import language_model
import story_qa
import transduction
from harness import results as results_module
from harness.nonfinite import NonFiniteError
from tasks.language_arguments import LanguageModelArguments
from tasks.story_answering import StoryArguments
from tasks.transduction import TransductionArguments


def language(folder: Path) -> tuple[Any, Callable[[Any], Any], type[Any]]:
    (folder / "text.txt").write_text("To be, or not to be: that is the question.\n" * 9)
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}
    settings = {"model_config": gpt2, "tokenizer_name": "characters", "block_size": 12, "cache_dir": str(folder / "c")}
    texts = {"train_file": str(folder / "text.txt"), "validation_file": str(folder / "text.txt")}
    return (
        LanguageModelArguments(**settings, **texts, **short(folder)),
        language_model.run,
        language_model.LanguageModelling,
    )


def inflection(folder: Path) -> tuple[Any, Callable[[Any], Any], type[Any]]:
    (folder / "words").write_text("ab\tabs\tV;3\nbad\tbads\tV;3\ncab\tcabbed\tV;PST\n" * 9)
    files = {"train_file": str(folder / "words"), "validation_file": str(folder / "words"), "width": 16}
    return TransductionArguments(**files, **short(folder)), transduction.run, transduction.Transduction


def stories(folder: Path) -> tuple[Any, Callable[[Any], Any], type[Any]]:
    sizes = {"train_stories": 30, "validation_stories": 7}
    return StoryArguments(**sizes, **short(folder)), story_qa.run, story_qa.StoryQuestions


def short(folder: Path) -> dict[str, Any]:
    return {"per_device_train_batch_size": 4, "max_train_steps": 4, "output_dir": str(folder / "run")}


SCRIPTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "language_model": (language, "transformer.h.1.mlp.c_fc"),
    "transduction": (inflection, "model.decoder.layers.0.fc1"),
    "story_qa": (stories, "sentence.layer.linear1"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_loss_that_is_not_finite_names_the_layer_in_every_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    make, layer = SCRIPTS[script]
    args, start, task = make(tmp_path)
    make_model, compute_loss = task.make_model, task.compute_loss
    state: dict[str, Any] = {"count": 0, "victim": None, "now": None}

    def making(self: Any) -> Any:
        model = make_model(self)

        def fail(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            bad = state["victim"] is not None and state["now"] is state["victim"]
            return output * float("nan") if bad else output

        model.get_submodule(layer).register_forward_hook(fail)
        return model

    def counting(self: Any, model: Any, batch: Any) -> Any:
        state["now"] = batch
        state["count"] += 1
        if state["count"] == 2:
            state["victim"] = batch
        return compute_loss(self, model, batch)

    monkeypatch.setattr(task, "make_model", making)
    monkeypatch.setattr(task, "compute_loss", counting)
    with pytest.raises(NonFiniteError, match=rf"loss is nan at step 2: first not finite is the output of {layer}\. "):
        start(args)
    saved = torch.load(tmp_path / "run" / "nonfinite-step-2.pt", weights_only=True)
    assert all(torch.equal(saved["batch"][name], value) for name, value in state["victim"].items())
    assert layer in saved["first"]
    assert results_module.read_results(tmp_path / "run") is None
