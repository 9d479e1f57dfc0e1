"""What the loop costs: bare steps do the same work, a slow loop is seen, and so is what waits for a device."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import finetune
from harness.arguments import FinetuneArguments
from harness.interleaved import FetchCounting, Profiled, TurnTaking, overhead
from harness.nonfinite import FiniteGuard
from harness.run import run_task
from loop_overhead import where_it_goes


@pytest.fixture
def args(settings: dict[str, Any]) -> FinetuneArguments:
    """Eight steps with dropout and a course of the temperature."""
    changes = {"max_train_steps": 9, "eval_steps": 9, "logging_steps": 2, "tau_schedule": "linear", "tau_end": 0.5}
    return FinetuneArguments(**{**settings, **changes, "per_device_train_batch_size": 4, "overwrite_output_dir": True})


def test_bare_steps_end_with_the_weights_of_the_loop_and_a_slow_loop_is_seen(
    args: FinetuneArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_forward = FiniteGuard.before_forward

    def slow(self: Any, *given: Any) -> None:
        time.sleep(0.3)
        before_forward(self, *given)

    monkeypatch.setattr(FiniteGuard, "before_forward", slow)
    taking = TurnTaking(finetune.Classification(args), args)
    run_task(args, taking)
    assert taking.same_weights()
    assert len(taking.loop) == 8
    assert len(taking.bare) == 9
    found = overhead(taking.loop, taking.bare, args.logging_steps)
    assert min(taking.loop[1:]) > 0.3
    assert found.low > 20
    taking._model.classifier.bias.data.add_(1e-3)
    assert not taking.same_weights()


def test_waits_between_logs_are_counted_by_caller(args: FinetuneArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    with FetchCounting(finetune.Classification(args), args) as counting:
        run_task(args, counting)
    assert {caller for caller in counting.between_logs() if caller != "model"} == set()
    assert counting.steps[1]["check"] > 0, "a log waits"

    def reading(self: Any, loss: Any) -> None:
        loss.item()
        self._window[-1].loss = loss.detach()

    monkeypatch.setattr(FiniteGuard, "after_forward", reading)
    with FetchCounting(finetune.Classification(args), args) as counting:
        run_task(args, counting)
    assert counting.between_logs()["_train_batch"] == 4, "one in each of the steps 1, 3, 5, 7"


def test_the_profile_names_loading_and_the_functions_of_the_loop(args: FinetuneArguments, tmp_path: Path) -> None:
    profiled = Profiled(finetune.Classification(args), args)
    run_task(args, profiled)
    found = where_it_goes(profiled)
    assert profiled.steps == 7
    assert 0 < found["loading_milliseconds"] < found["milliseconds_per_step"]
    assert "harness/loop.py:_finish_step" in found["functions"]


def test_overhead_is_that_of_the_blocks_after_the_first() -> None:
    found = overhead([9.0, 9.0, 1.1, 1.1, 1.1, 1.1, 1.2, 1.2], [1.0] * 8, 2)
    assert found.percent == pytest.approx(100 * (6.8 / 6 - 1))
    assert found.median == pytest.approx(10)
    assert found.blocks == 3
    assert found.low <= found.percent <= found.high
    with pytest.raises(ValueError, match="at least 4 blocks of 2 steps, got 3"):
        overhead([1.0] * 7, [1.0] * 8, 2)
