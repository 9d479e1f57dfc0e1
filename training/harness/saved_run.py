"""What a checkpoint holds, beyond what Accelerate saves: how far the run is, what it measured, which run it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.utils import RNG_STATE_NAME, set_seed
from accelerate.utils import load as load_tensors

from harness.attention import AttentionControl
from harness.errors import UsageError
from harness.results import CONFIG_FILE

RUN_FILE = "run.json"
_VERSION = 2


@dataclasses.dataclass
class TrainingRecord:
    """What a run measured.

    ``train`` has one entry per ``logging_steps``: step, epoch, tau, loss, learning_rate. ``evaluation`` has
    one per evaluation and mode: step, epoch, tau, mode and the task's metrics. ``final`` are the metrics of
    the last evaluation by mode. ``resumed_at`` are the steps at which the run went on from a checkpoint; times are
    those of the steps that count, without what was lost. ``tokens`` are those of all processes up to the last entry of
    ``train``; None where the batches do not tell them.
    """

    train: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluation: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    final: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    steps: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    resumed_at: list[int] = dataclasses.field(default_factory=list)
    tokens: int | None = 0


@dataclasses.dataclass
class Progress:
    """How far a run is, at the end of an optimiser step.

    Attributes:
        record: what it measured.
        epoch: passes over the data that are complete.
        batches: batches of the present epoch that each process has taken.
        order: state of the generator of the data's order at the beginning of the epoch.
        losses: of the batches since the last entry of the training series, on the device.
        tokens: of these batches, on the device.
        logged_at: the seconds of training at that entry.
    """

    record: TrainingRecord = dataclasses.field(default_factory=TrainingRecord)
    epoch: int = 0
    batches: int = 0
    order: torch.Tensor | None = None
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)
    tokens: list[torch.Tensor] = dataclasses.field(default_factory=list)
    logged_at: float = 0.0


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """Which run it is: what a checkpoint must agree with to be resumed.

    Attributes:
        config: the resolved settings.
        data: what the task says about its data.
        processes: their number.
        environment: device and versions; a difference is told, not refused.
        tracking_id: the name under which trackers know the run; None if no tracker had it.
        code: git states of the code that the run's parts began with, in their order, none twice in a row; a
            difference is told, not refused.
    """

    config: dict[str, Any]
    data: dict[str, Any]
    processes: int
    environment: dict[str, Any]
    tracking_id: str | None = None
    code: list[dict[str, Any] | None] = dataclasses.field(default_factory=list)

    @property
    def examples_per_batch(self) -> int:
        """Of all processes together, in one forward pass."""
        return int(self.config["per_device_train_batch_size"]) * self.processes

    @property
    def examples_per_step(self) -> int:
        """Of all processes together, in one optimiser step."""
        return self.examples_per_batch * int(self.config["gradient_accumulation_steps"])


def use_plain_names(accelerator: Accelerator) -> None:
    """Has weights saved under the names of the bare model, so that any number of processes can load them.

    Accelerate's own names are those of the wrapped model, with DistributedDataParallel's prefix. Where its engine
    saves the weights itself (FSDP, DeepSpeed), there are none here to rename.
    """

    def bare(model: torch.nn.Module) -> torch.nn.Module:
        return accelerator.unwrap_model(model, keep_torch_compile=False)

    def rename(models: list[torch.nn.Module], weights: list[dict[str, Any]], _: str) -> None:
        weights[:] = [bare(model).state_dict() for model in models[: len(weights)]]

    def unwrap(models: list[torch.nn.Module], _: str) -> None:
        models[:] = [bare(model) for model in models]

    accelerator.register_save_state_pre_hook(rename)
    accelerator.register_load_state_pre_hook(unwrap)


def save_run(
    folder: Path,
    accelerator: Accelerator,
    identity: RunIdentity,
    progress: Progress,
    model: Any,
    attention: AttentionControl,
) -> None:
    """Writes everything a run needs to go on into ``folder``; every process calls this.

    Accelerate writes weights, optimiser, scheduler, gradient scaler and the states of the random generators. With the
    configurations of model and attention beside the weights, the folder can also be read by
    ``gumbel_attention.from_pretrained``.
    """
    accelerator.save_state(str(folder))
    pending = {name: _on_cpu(getattr(progress, name)) for name in ("losses", "tokens")}
    torch.save(pending | {"order": progress.order}, folder / _loop_file(accelerator.process_index))
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    if accelerator.is_main_process or accelerator.distributed_type == DistributedType.FSDP:
        attention.save(bare, folder)  # learned temperatures may be sharded; the first process writes
    if not accelerator.is_main_process:
        return
    content = {
        "version": _VERSION,
        "epoch": progress.epoch,
        "batches": progress.batches,
        "logged_at": progress.logged_at,
        "record": dataclasses.asdict(progress.record),
        "identity": dataclasses.asdict(identity),
    }
    (folder / RUN_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(identity.config, sort_keys=False), encoding="utf-8")
    if hasattr(bare, "config"):
        bare.config.save_pretrained(folder)


def read_identity(checkpoint: Path) -> RunIdentity:
    """Which run a sound checkpoint is of.

    Raises:
        UsageError: this version cannot read it.
    """
    return RunIdentity(**_read(checkpoint)["identity"])


def read_steps(checkpoint: Path) -> int:
    """How many optimiser steps a sound checkpoint's run had taken.

    Raises:
        UsageError: this version cannot read it.
    """
    return int(_read(checkpoint)["record"]["steps"])


def load_run(checkpoint: Path, accelerator: Accelerator, identity: RunIdentity) -> Progress:
    """Restores all that :func:`save_run` wrote, the states of the random generators last.

    With another number of processes than the checkpoint's the data go on where they were, the noise of each process
    is drawn afresh from the seed and the step, and the losses not yet in the series are those of all processes.

    Raises:
        UsageError: the checkpoint cannot be read, or was taken between two batches of the present size.
    """
    content, rank = _read(checkpoint), accelerator.process_index
    saved = RunIdentity(**content["identity"])
    same = saved.processes == identity.processes
    loops = [torch.load(checkpoint / _loop_file(index), weights_only=True) for index in range(saved.processes)]
    for loop in loops:
        loop.setdefault("tokens", torch.empty(0))  # not counted when the checkpoint was written

    def pending(name: str) -> list[torch.Tensor]:  # the first of another number of processes takes what all had
        whole = torch.stack([loop[name] for loop in loops]).sum(0)
        own = loops[rank][name] if same else whole * (rank == 0)
        return list(own.to(accelerator.device))

    batches, rest = divmod(content["batches"] * saved.examples_per_batch, identity.examples_per_batch)
    if rest:
        raise UsageError(
            f"{str(checkpoint)!r} is {content['batches'] * saved.examples_per_batch} examples into an epoch, which is "
            f"no whole number of batches of {identity.examples_per_batch}: keep per_device_train_batch_size times "
            "the number of processes."
        )
    accelerator.load_state(str(checkpoint))
    record = TrainingRecord(**({"tokens": None} | content["record"]))
    if same:
        _restore_random_states(checkpoint, accelerator)
    else:
        entropy = np.random.SeedSequence((identity.config["seed"], record.steps, rank))
        set_seed(int(entropy.generate_state(1)[0]))
    logged_at = content.get("logged_at", record.train_seconds)
    return Progress(
        *(record, content["epoch"], batches, loops[0]["order"], pending("losses"), pending("tokens"), logged_at)
    )


def describe_data(name: str, rows: Any, sample: int = 1000) -> dict[str, Any]:
    """What tells data sets apart: the number of rows and the content of about ``sample`` of them, evenly spread."""
    picked = [rows[index] for index in range(0, len(rows), max(1, len(rows) // sample))]
    content = json.dumps(picked, sort_keys=True, default=str)
    return {f"{name}_rows": len(rows), f"{name}_sha256": hashlib.sha256(content.encode()).hexdigest()}


def _restore_random_states(checkpoint: Path, accelerator: Accelerator) -> None:
    """As Accelerate does, which passes over a failure to do it."""
    states = load_tensors(checkpoint / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])  # noqa: NPY002 - the state that was saved
    torch.set_rng_state(states["torch_manual_seed"])
    device = accelerator.device
    if device.type == "cuda" and "torch_cuda_manual_seed" in states:
        torch.cuda.set_rng_state(states["torch_cuda_manual_seed"][device.index or 0], device)


def _on_cpu(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).cpu() if values else torch.empty(0)


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        content = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{str(checkpoint)!r} is no checkpoint of these scripts: {RUN_FILE}: {error}.") from error
    if content.get("version") != _VERSION:
        raise UsageError(
            f"{str(checkpoint)!r} has version {content.get('version')!r} of {RUN_FILE}, this program reads {_VERSION}."
        )
    return content


def _loop_file(process: int) -> str:
    return f"loop_{process}.pt"
