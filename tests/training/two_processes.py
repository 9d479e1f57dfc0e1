"""What each of two processes does for test_processes.py: ``torchrun --nproc_per_node 2 two_processes.py FOLDER``.

PYTHONPATH must lead to the package and to training/.

FOLDER/settings.json holds the settings of a run; every process writes FOLDER/process_<rank>.pt with what it saw.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from interrupted import start
from sharded import train_sharded, train_sharded_and_save, train_sharded_by_hand
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from transformers.modeling_outputs import SequenceClassifierOutput

import finetune
from tasks.classification import evaluate

QUIET: dict[str, Any] = {"hard": True, "noise": "none", "learn_tau": "head", "max_grad_norm": 0.0}
"""Noise off; the gradients are those of the loss."""
NOISY: dict[str, Any] = {"hard": True, "tau_schedule": "exponential", "tau_end": 0.5, "save_model": True}
UNEVEN: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2}
"""24 examples: two processes take six batches each in an epoch."""
SIZES = [(872, 64), (11, 4), (8, 4), (9, 4), (7, 4), (5, 4), (4, 4), (3, 4), (1, 4), (871, 32)]
"""(rows, batch size per process) of evaluations; SST-2 has 872."""


@contextmanager
def seen_gradients() -> Iterator[list[torch.Tensor]]:
    """The list gets the gradients of every optimiser step, all parameters in one vector."""
    seen: list[torch.Tensor] = []

    def look(optimizer: Any, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        seen.append(torch.cat([parameter.grad.detach().flatten() for parameter in parameters]))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def seen_noise(wrong_seed: bool = False) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Gets what the bare model makes of one and the same batch before every batch, in training and in evaluation.

    Args:
        wrong_seed: the processes are seeded alike, as a control.
    """
    seen: dict[str, list[torch.Tensor]] = {"training": [], "evaluation": []}
    batch = {"input_ids": torch.arange(2, 12).repeat(4, 1), "attention_mask": torch.ones(4, 10, dtype=torch.long)}

    def look(model: Any) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = getattr(model, "module", model)(**batch).logits
        return logits

    compute_loss, evaluation = finetune.Classification.compute_loss, finetune.Classification.evaluate

    def compute(task: Any, model: Any, batch: Any) -> torch.Tensor:
        seen["training"].append(look(model))
        return compute_loss(task, model, batch)

    def evaluating(task: Any, accelerator: Any, model: Any, loader: Any) -> dict[str, float]:
        seen["evaluation"].append(look(model.eval()))
        return evaluation(task, accelerator, model, loader)

    def seed_alike(seed: int, device_specific: bool = False) -> None:
        set_seed(seed)

    with (
        mock.patch.object(finetune.Classification, "compute_loss", compute),
        mock.patch.object(finetune.Classification, "evaluate", evaluating),
        mock.patch("harness.run.set_seed", seed_alike if wrong_seed else set_seed),
    ):
        yield seen


def quiet_run(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run without noise; its series and gradients."""
    with seen_gradients() as gradients:
        record = start({**settings, **QUIET}, **changes)
    return {"train": record.train, "evaluation": record.evaluation, "gradients": gradients}


class Counting(torch.nn.Module):
    """A stub whose label is the number of the row: its loss on row i is log(rows) - i / rows, up to a constant."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SequenceClassifierOutput:
        logits = torch.zeros(len(labels), 1000)
        logits[torch.arange(len(labels)), labels] = input_ids[:, 0].float().sqrt()
        return SequenceClassifierOutput(logits=logits)


def rows_evaluated(rows: int, batch_size: int) -> dict[str, Any]:
    """The rows that the evaluation of the classification task sees, and its metrics."""
    accelerator = Accelerator()
    data = [{"input_ids": torch.tensor([row]), "labels": torch.tensor(row)} for row in range(rows)]
    loader = accelerator.prepare(DataLoader(data, batch_size=batch_size))  # type: ignore[arg-type]  # a list will do
    seen: list[int] = []
    gather = accelerator.gather_for_metrics

    def gathering(values: Any) -> Any:
        gathered = gather(values)
        seen.extend(gathered[2].tolist())
        return gathered

    with mock.patch.object(accelerator, "gather_for_metrics", gathering):
        metrics = evaluate(accelerator, Counting(), loader)
    return {"rows": seen, "metrics": metrics}


def work(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """All that is done in two processes; checkpoints of one process lie in FOLDER/one."""
    results: dict[str, Any] = {}
    with_dropout = settings.pop("with_dropout")
    half = {**settings, "per_device_train_batch_size": 4}

    def in_folder(name: str, **changes: Any) -> dict[str, Any]:
        return {"output_dir": str(folder / name), **changes}

    results["quiet"] = quiet_run(half, **in_folder("two", checkpointing_steps=1, keep_last=None))
    results["accumulated"] = quiet_run({**settings, **UNEVEN}, **in_folder("accumulated", logging_steps=1))
    uneven = {**settings, "train_file": settings["train_file"].replace("train", "uneven")}
    results["uneven"] = quiet_run({**uneven, "per_device_train_batch_size": 4}, **in_folder("uneven"))
    results["uneven, accumulated"] = quiet_run({**uneven, **UNEVEN}, **in_folder("uneven-2", logging_steps=1))
    results["from one"] = quiet_run(
        half, **in_folder("from-one", resume_from_checkpoint=str(folder / "one" / "checkpoint-4"))
    )
    noisy = {**settings, **NOISY, **UNEVEN, "model_name_or_path": with_dropout}
    start(noisy, **in_folder("noisy", checkpointing_steps=1, keep_last=None))
    start(noisy, **in_folder("again"))
    start(noisy, **in_folder("resumed", resume_from_checkpoint=str(folder / "noisy" / "checkpoint-4")))
    for name, wrong in (("noise", False), ("noise, seeded alike", True)):
        with seen_noise(wrong) as results[name]:
            start(half, **in_folder(name, hard=True, num_train_epochs=1))
    with seen_noise() as results["noise after one process"]:
        checkpoint = str(folder / "one-noisy" / "checkpoint-3")
        start(half, **in_folder("noise-after-one", hard=True, resume_from_checkpoint=checkpoint))
    results["evaluated"] = [rows_evaluated(*size) for size in SIZES]
    results["learned"] = train_sharded_and_save({**half, "num_train_epochs": 1}, folder / "learned")
    results["sharded by hand"] = train_sharded_by_hand(settings["model_name_or_path"], folder / "sharded.pt")
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        results[kind] = train_sharded(half, folder / kind.lower(), kind)
    return results


def main(folder: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    rank = Accelerator().process_index
    keep: Callable[..., None] = lambda self: AcceleratorState._reset_state(reset_partial_state=True)  # noqa: E731
    with mock.patch.object(Accelerator, "end_training", keep):  # the processes have more runs to make together
        results = work(folder, settings)
    torch.save(results, folder / f"process_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
