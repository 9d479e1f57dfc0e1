"""A loss or gradient that is not finite: where it began, which batch, and weights that it has not touched."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import outcome, start, words
from torch.utils._python_dispatch import TorchDispatchMode

import finetune
from harness import loop as loop_module
from harness.checkpoints import find_checkpoints
from harness.nonfinite import NonFiniteError
from harness.results import read_results

LAYER = "bert.encoder.layer.1.intermediate"


class Poison(torch.autograd.Function):
    """The identity, whose gradient is inf."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


@pytest.fixture
def poisoned(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A run in which one batch of training makes ``LAYER`` fail, whenever that batch comes, in the way set in it.

    ``batch`` counts training batches from 1; ``seen`` gets the weights before each, ``losses`` those of the bad one.
    """
    state: dict[str, Any] = {"batch": 5, "way": "forward", "seen": [], "victim": None, "now": None, "losses": []}
    load, compute_loss = finetune.load_classifier, finetune.Classification.compute_loss

    def loading(*args: Any) -> Any:
        model = load(*args)

        def fail(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if state["victim"] is None or state["now"] is not state["victim"]:
                return output
            return output * float("nan") if state["way"] == "forward" else Poison.apply(output)

        model.get_submodule(LAYER).register_forward_hook(fail)
        return model

    def counting(self: Any, model: Any, batch: Any) -> Any:
        state["now"] = batch
        if state["victim"] is None or batch is not state["victim"]:
            state["seen"].append({name: weight.detach().clone() for name, weight in model.state_dict().items()})
        if len(state["seen"]) == state["batch"] and state["victim"] is None:
            state["victim"] = batch
        loss = compute_loss(self, model, batch)
        if batch is state["victim"]:
            state["losses"].append(loss.item())
        return loss

    monkeypatch.setattr(finetune, "load_classifier", loading)
    monkeypatch.setattr(finetune.Classification, "compute_loss", counting)
    yield state
    assert settings


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("forward", f"the training loss is nan at step 3: first not finite is the output of {LAYER}. "),
        (
            "backward",
            rf"the gradient is not finite at step 3: .* the gradient of the output of {LAYER}\.intermediate_act_fn. ",
        ),
    ],
)
def test_the_layer_is_named_and_the_batch_saved(
    settings: dict[str, Any], poisoned: dict[str, Any], tmp_path: Path, way: str, message: str, clip: float
) -> None:
    poisoned["way"] = way
    changes: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "max_grad_norm": clip,
    }
    changes |= {"tau_schedule": "linear", "tau_end": 0.3}
    message += r"Batch 1 of the step's 2 is in .*nonfinite-step-3\.pt\. Possible cures: lower learning_rate"
    with pytest.raises(NonFiniteError, match=message):
        start(settings, logging_steps=6, eval_steps=100, checkpointing_steps=2, **changes)
    first, again = poisoned["losses"]
    assert first == again or way == "forward", "the second look has the noise, dropout and temperature of the first"
    folder = tmp_path / "run"
    saved = torch.load(folder / "nonfinite-step-3.pt", weights_only=True)
    assert saved["step"] == 3
    assert LAYER in saved["first"]
    assert all(torch.equal(saved["batch"][name], poisoned["victim"][name]) for name in poisoned["victim"])
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-2"], "4 would have held a run that failed"
    assert read_results(folder) is None
    before, last = poisoned["seen"][4], poisoned["seen"][-1]
    assert len(poisoned["seen"]) >= 7, "later batches of the window were run"
    assert all(torch.equal(before[name], last[name]) for name in before), (
        "the bad step and those after changed nothing"
    )
    assert not all(torch.equal(before[name], poisoned["seen"][0][name]) for name in before)


def test_script_ends_with_a_message(
    settings: dict[str, Any], poisoned: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned["batch"] = 2
    with pytest.raises(SystemExit) as stopped:
        finetune.main(words(settings))
    assert stopped.value.code == 1
    assert "finetune.py: error: the training loss is nan at step 2" in capsys.readouterr().err


class FetchCounter(TorchDispatchMode):
    """Counts ``.item()`` and its like in the loop's own code; not the model's, nor that of the order of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.fetches: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            caller = [frame.name for frame in traceback.extract_stack() if "/harness/" in frame.filename][-1]
            if caller not in ("loss_of_model", "_rest_of_epoch"):
                self.fetches.append(caller)
        return func(*args, **(kwargs or {}))


def test_nothing_is_fetched_from_the_device_between_logs(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU twin of ``torch.cuda.set_sync_debug_mode``."""
    counter, by_step = FetchCounter(), []
    finish = loop_module.TrainingLoop._finish_step

    def finishing(self: Any) -> None:
        finish(self)
        by_step.append(sorted(set(counter.fetches)))
        counter.fetches.clear()

    monkeypatch.setattr(loop_module.TrainingLoop, "_finish_step", finishing)
    with counter:
        start(settings, logging_steps=3, eval_steps=100, num_train_epochs=2, checkpointing_steps=100)
    assert by_step[:2] == [[], []]
    assert by_step[2] == ["_log", "check"]
    assert by_step[3:5] == [[], []]


def test_guard_changes_nothing_while_all_is_finite(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(settings, save_model=True, output_dir=str(tmp_path / "guarded"))
    monkeypatch.setattr("harness.nonfinite.WINDOW", 1)
    start(settings, save_model=True, output_dir=str(tmp_path / "checked"))
    assert outcome(tmp_path / "guarded") == outcome(tmp_path / "checked")
    monkeypatch.setattr("harness.loop.FiniteGuard.clip", _clip_only)
    start(settings, save_model=True, output_dir=str(tmp_path / "bare"))
    assert outcome(tmp_path / "guarded") == outcome(tmp_path / "bare")


def _clip_only(self: Any) -> None:
    self._accelerator.clip_grad_norm_(self._model.parameters(), self._max_grad_norm)
