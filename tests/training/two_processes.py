"""What each of two processes does for test_processes.py.

FOLDER/settings.json holds the settings of a run; every process writes FOLDER/process_<rank>.pt with what it saw.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from gradients import seen_gradients
from interrupted import start
from sharded import train_sharded, train_sharded_and_save, train_sharded_by_hand
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers.modeling_outputs import SequenceClassifierOutput

import finetune
from harness.processes import end_together
from tasks.classification import evaluate

QUIET: dict[str, Any] = {"hard": True, "noise": "none", "learn_tau": "head", "max_grad_norm": 0.0}
"""Noise off; the gradients are those of the loss."""
NOISY: dict[str, Any] = {"hard": True, "tau_schedule": "exponential", "tau_end": 0.5, "save_model": True}
UNEVEN: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2}
"""24 examples: two processes take six batches each in an epoch."""
SIZES = [(872, 64), (11, 4), (8, 4), (9, 4), (7, 4), (5, 4), (4, 4), (3, 4), (1, 4), (871, 32)]
"""(rows, batch size per process) of evaluations; SST-2 has 872."""
ENDS = 50


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


def count_copies() -> int:
    """The models in memory that DistributedDataParallel has wrapped."""
    return sum(type(thing) is DistributedDataParallel for thing in gc.get_objects())


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
        seen.extend(gathered[:, 3].int().tolist())
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


class BareAccelerator:
    """What end_together needs of an Accelerator, with no call in between that gives gloo's threads time."""

    num_processes = 2
    wait_for_everyone = staticmethod(torch.distributed.barrier)
    end_training = staticmethod(torch.distributed.destroy_process_group)

    def __init__(self) -> None:
        self.model: Any = DistributedDataParallel(torch.nn.Linear(2, 2))

    def free_memory(self) -> None:
        self.model = None


def end_often(folder: Path, rank: int) -> int:
    """Ends the group of processes right after a collective call, again and again; returns how often.

    The interpreter's lock is hardly ever given up, and gloo's threads still have that call's tensors to free: closed
    before the model is freed, the group does not get past the tenth time.
    """
    faulthandler.dump_traceback_later(120, exit=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60.0)
    for number in range(ENDS):
        store = torch.distributed.FileStore(str(folder / f"store-{number}"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        accelerator: Any = BareAccelerator()
        assert number > 0 or count_copies() == 1
        torch.distributed.all_gather([torch.empty(3), torch.empty(3)], torch.ones(3))
        end_together(accelerator)
    sys.setswitchinterval(interval)
    faulthandler.cancel_dump_traceback_later()
    return ENDS


def main(folder: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    copies_at_the_end: list[int] = []

    def keep(self: Any) -> None:
        """In place of ending, for the processes have more runs to make together."""
        copies_at_the_end.append(count_copies())
        AcceleratorState._reset_state(reset_partial_state=True)

    rank = Accelerator().process_index
    with mock.patch.object(Accelerator, "end_training", keep):
        results = work(folder, settings)
    torch.distributed.destroy_process_group()
    results |= {"copies at the end": copies_at_the_end, "ends": end_often(folder, rank)}
    torch.save(results, folder / f"process_{rank}.pt")
