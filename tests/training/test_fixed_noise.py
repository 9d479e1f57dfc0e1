"""Noise that belongs to an example, and evaluation on a part of the training data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import data_of, run

import finetune
import gumbel_attention as ga
from harness.arguments import FinetuneArguments
from harness.attention import attention_config
from harness.errors import UsageError
from harness.fixed_noise import INDEX


def task_of(settings: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    args = FinetuneArguments(**{**settings, **changes})
    task = finetune.Classification(args)
    task.load_data(finetune.Accelerator(cpu=True))
    torch.manual_seed(0)
    model = task.make_model().eval()  # no dropout
    config = attention_config(args)
    assert config is not None
    ga.patch_model(model, config).noise(True)
    return task, model


def rows_of(task: Any, rows: list[int]) -> dict[str, torch.Tensor]:
    batch = [{key: task.data.train[row][key] for key in task.data.train.column_names} for row in rows]
    return dict(task.make_loaders(torch.Generator())[0].collate_fn(batch))


def loss_of(task: Any, model: Any, row: int) -> float:
    return loss_of_batch(task, model, rows_of(task, [row]))


def loss_of_batch(task: Any, model: Any, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float(task.compute_loss(model, batch))


@pytest.mark.parametrize("hard", [False, True])
def test_an_example_meets_the_same_noise_again_and_others_do_not(settings: dict[str, Any], hard: bool) -> None:
    task, model = task_of(settings, fixed_noise=True, hard=hard)
    first = [loss_of(task, model, row) for row in range(6)]
    assert [loss_of(task, model, row) for row in range(6)] == first
    together = loss_of_batch(task, model, rows_of(task, list(range(6))))
    assert together == pytest.approx(sum(first) / 6, rel=1e-5)
    elsewhere = rows_of(task, [0]) | {INDEX: torch.tensor([1])}
    assert loss_of_batch(task, model, elsewhere) != first[0]  # the noise is the example's, not the text's
    fresh, other = task_of(settings, hard=hard)
    assert loss_of(fresh, other, 0) != loss_of(fresh, other, 0)  # the control
    reseeded, again = task_of(settings, fixed_noise=True, hard=hard, seed=settings.get("seed", 0) + 1)
    assert loss_of(reseeded, again, 0) != first[0]


def test_the_batch_keeps_its_numbers_for_a_second_look(settings: dict[str, Any]) -> None:
    task, model = task_of(settings, fixed_noise=True)
    batch = rows_of(task, [3, 5])
    task.compute_loss(model, batch)
    assert batch[INDEX].tolist() == [3, 5]


def test_a_run_with_fixed_noise_repeats_and_is_another_run(settings: dict[str, Any]) -> None:
    def losses(**changes: Any) -> list[float]:
        return [entry["loss"] for entry in run(settings, **changes).train]

    assert losses(fixed_noise=True) == losses(fixed_noise=True)
    assert losses(fixed_noise=True) != losses()


@pytest.mark.parametrize(
    "changes", [{"noise": "none"}, {"attention": "unpatched"}, {"gradient_checkpointing": True}], ids=str
)
def test_fixed_noise_without_noise_or_seeds_is_refused(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="fixed_noise"):
        FinetuneArguments(**{**settings, "fixed_noise": True, **changes})


def test_held_out_rows_are_not_trained_on_and_the_same_for_every_seed(settings: dict[str, Any]) -> None:
    whole = data_of(settings)
    split = data_of(settings, holdout_percentage=25)
    assert len(split.validation) == len(whole.train) // 4
    assert len(split.train) + len(split.validation) == len(whole.train)
    both = sorted(map(tuple, [*split.train["input_ids"], *split.validation["input_ids"]]))
    assert both == sorted(map(tuple, whole.train["input_ids"]))
    assert data_of(settings, holdout_percentage=25, seed=7).validation["input_ids"] == split.validation["input_ids"]
    assert (
        data_of(settings, holdout_percentage=25, data_seed=7).validation["input_ids"] != split.validation["input_ids"]
    )


@pytest.mark.parametrize("share", [0, 100, 1])
def test_a_holdout_that_leaves_nothing_is_refused(settings: dict[str, Any], share: int) -> None:
    with pytest.raises(UsageError, match="holdout_percentage"):
        data_of(settings, holdout_percentage=share)
