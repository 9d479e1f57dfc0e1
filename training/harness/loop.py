"""The training loop: Accelerate, a temperature that follows the optimiser step, repeatable evaluation."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_scheduler

from harness.arguments import FinetuneArguments
from harness.attention import AttentionControl

Evaluate = Callable[[Accelerator, torch.nn.Module, Any], dict[str, float]]
"""(accelerator, model, loader) -> metrics over all examples; the model is in train() before and after."""


@dataclasses.dataclass
class TrainingRecord:
    """What a run measured.

    ``train`` has one entry per ``logging_steps``: step, epoch, tau, loss, learning_rate. ``evaluation`` has
    one per evaluation and mode: step, epoch, tau, mode and the task's metrics. ``final`` are the metrics of
    the last evaluation by mode.
    """

    train: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluation: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    final: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    steps: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0


def total_steps(args: FinetuneArguments, batches: int) -> int:
    """Optimiser steps of a run whose prepared training loader has ``batches`` batches."""
    return args.max_train_steps or args.num_train_epochs * steps_per_epoch(args, batches)


def steps_per_epoch(args: FinetuneArguments, batches: int) -> int:
    """Optimiser steps in one pass over the data; a last, shorter accumulation counts."""
    return math.ceil(batches / args.gradient_accumulation_steps)


def make_optimizer(
    model: torch.nn.Module, args: FinetuneArguments, undecayed: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW; vectors (biases, norms) and the parameters in ``undecayed`` get no weight decay."""
    exempt = {id(parameter) for parameter in undecayed}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1 and id(parameter) not in exempt]
    rest = [parameter for parameter in trained if parameter.ndim <= 1 or id(parameter) in exempt]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate)


def make_scheduler(optimizer: torch.optim.Optimizer, args: FinetuneArguments, steps: int) -> Any:
    """Learning rate over ``steps`` optimiser steps, warm-up included."""
    warmup = args.num_warmup_steps or math.ceil(args.warmup_ratio * steps)
    return get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


@contextmanager
def isolated_rng(device: torch.device, *entropy: int) -> Iterator[None]:
    """Within this context torch draws from a stream seeded by ``entropy``; the stream before comes back after it."""
    on_device = device.type != "cpu"
    devices = [torch.cuda.current_device() if device.index is None else device.index] if on_device else []
    with torch.random.fork_rng(devices, device_type=device.type if on_device else "cuda"):
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
        yield


class TrainingLoop:
    """Trains and evaluates one model.

    Args:
        accelerator: made with the run's gradient accumulation.
        args: the run's settings.
        model: prepared by the accelerator.
        optimizer: prepared by the accelerator.
        train_loader: prepared; its generator, not the default one, draws the order of the data.
        eval_loader: prepared.
        attention: sets the temperature and the noise of evaluation.
        evaluate: computes the task's metrics.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: FinetuneArguments,
        model: torch.nn.Module,
        optimizer: Any,
        train_loader: DataLoader[Any],
        eval_loader: DataLoader[Any],
        attention: AttentionControl,
        evaluate: Evaluate,
    ) -> None:
        self.accelerator = accelerator
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.train_loader = train_loader
        self.eval_loader = eval_loader
        self.attention = attention
        self.evaluate = evaluate
        self.steps_per_epoch = steps_per_epoch(args, len(train_loader))
        self.total_steps = total_steps(args, len(train_loader))
        # The scheduler is stepped here, once per optimiser step; a prepared one would step once per process.
        self.scheduler = make_scheduler(optimizer, args, self.total_steps)
        self.record = TrainingRecord()
        self._losses: list[torch.Tensor] = []

    def run(self) -> TrainingRecord:
        """Trains for all steps, evaluating on the way and at the end.

        Raises:
            FloatingPointError: the training loss is not finite.
        """
        show = None if self.accelerator.is_local_main_process else True  # None: only on a terminal
        started = time.perf_counter()
        self.model.train()
        self.attention.set_step(0)
        with tqdm(total=self.total_steps, disable=show, desc="train") as progress:
            while self.record.steps < self.total_steps:
                self._train_epoch(progress)
        self._synchronize()
        self.record.train_seconds = time.perf_counter() - started - self.record.eval_seconds
        return self.record

    def _train_epoch(self, progress: tqdm[Any]) -> None:
        for batch in self.train_loader:
            self._train_batch(batch)
            if not self.accelerator.sync_gradients:
                continue
            progress.update()
            self._finish_step()
            if self.record.steps == self.total_steps:
                return

    def _train_batch(self, batch: Any) -> None:
        with self.accelerator.accumulate(self.model):
            loss = self.model(**batch).loss
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients and self.args.max_grad_norm > 0:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self._losses.append(loss.detach())

    def _finish_step(self) -> None:
        """Counts an optimiser step, then logs, evaluates and sets the temperature of the next one."""
        record, last = self.record, self.record.steps + 1 == self.total_steps
        learning_rate = self.scheduler.get_last_lr()[0]
        record.steps += 1
        if not self.optimizer.step_was_skipped:
            self.scheduler.step()
        if last or record.steps % self.args.logging_steps == 0:
            self._log(learning_rate)
        self.attention.set_step(record.steps)
        if last or record.steps % (self.args.eval_steps or self.steps_per_epoch) == 0:
            self._evaluate()

    def _log(self, learning_rate: float) -> None:
        """Adds the mean loss since the last entry, over all processes."""
        mean = torch.stack(self._losses).float().mean()
        loss = self.accelerator.gather(mean.reshape(1)).mean().item()
        self._losses.clear()
        step = self.record.steps
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss} at step {step}: "
                "lower learning_rate, raise tau, or check mixed_precision."
            )
        tau = self.attention.tau(step - 1)
        self.record.train.append(
            {"step": step, "epoch": self._epoch(), "tau": tau, "loss": loss, "learning_rate": learning_rate}
        )

    def _evaluate(self) -> None:
        """Evaluates in every mode; draws from a stream of its own, which repeats for a seed and a step."""
        self._synchronize()
        started = time.perf_counter()
        step = self.record.steps
        for mode in self.attention.evaluation_modes():
            rank = self.accelerator.process_index
            with isolated_rng(self.accelerator.device, self.args.seed, step, rank), self.attention.evaluating(mode):
                metrics = self.evaluate(self.accelerator, self.model, self.eval_loader)
            place = {"step": step, "epoch": self._epoch(), "tau": self.attention.tau(step), "mode": mode}
            self.record.evaluation.append(place | metrics)
            self.record.final[mode] = metrics
            if self.accelerator.is_main_process:
                numbers = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
                tqdm.write(f"step {step}/{self.total_steps}, {mode}: {numbers}")
        self._synchronize()
        self.record.eval_seconds += time.perf_counter() - started

    def _epoch(self) -> float:
        return self.record.steps / self.steps_per_epoch

    def _synchronize(self) -> None:
        """Waits for the GPU, so that a clock read after it counts finished work."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
