"""The training loop: Accelerate, a temperature that follows the optimiser step, repeatable evaluation, checkpoints.

Whatever the loop does is decided by the state at the end of an optimiser step, which is what a checkpoint holds: a
run that goes on from one computes what the run that was not stopped computed. Losses stay on the device until they
are logged.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType, skip_first_batches
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_scheduler

from harness.arguments import RunArguments
from harness.attention import AttentionControl
from harness.attention_measures import AttentionMeasures
from harness.checkpoints import write_checkpoint
from harness.evaluation import numbers_of, sampling
from harness.nonfinite import ComputeLoss, FiniteGuard
from harness.saved_run import Progress, RunIdentity, TrainingRecord, load_run, save_run
from harness.stopping import Stopped, StopSignals
from harness.throughput import count_tokens
from harness.tracking import bar_text, evaluation_values, train_values

_USUAL_WEIGHT = 1024.0
"""A power of two, lest it round: keeps the gradients of weighted losses in the range of half precision."""

__all__ = ["TrainingLoop", "TrainingParts", "TrainingRecord"]

Evaluate = Callable[[Accelerator, torch.nn.Module, Any], Mapping[str, float | str]]
"""(accelerator, model, loader) -> metrics over all examples; the model is in train() before and after.

Texts among them are for the evaluation series alone.
"""


def loss_of_model(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The loss that a transformers model computes from labels in the batch."""
    loss: torch.Tensor = model(**batch).loss
    return loss


@dataclasses.dataclass(frozen=True)
class TrainingParts:
    """What the loop trains with.

    Attributes:
        model: prepared by the accelerator.
        optimizer: prepared by the accelerator.
        scheduler: prepared by an accelerator that does not step it with the optimiser: the loop does.
        train_loader: prepared; draws the order of the data from ``order`` and nothing from the default generator.
        eval_loader: prepared.
        order: the generator of the order of the training data.
        attention: sets the temperature and the noise of evaluation.
        evaluate: computes the task's metrics.
        compute_loss: computes the loss of a batch.
        weight: of a batch's mean loss in that of an optimiser step, a 0-d tensor on its device, such as the number of
            its tokens; None is the number of its examples.
    """

    model: torch.nn.Module
    optimizer: Any
    scheduler: Any
    train_loader: DataLoader[Any]
    eval_loader: DataLoader[Any]
    order: torch.Generator
    attention: AttentionControl
    evaluate: Evaluate
    compute_loss: ComputeLoss = loss_of_model
    weight: Callable[[Any], torch.Tensor] | None = None


def total_steps(args: RunArguments, batches: int) -> int:
    """Optimiser steps of a run whose prepared training loader has ``batches`` batches."""
    return args.max_train_steps or args.num_train_epochs * steps_per_epoch(args, batches)


def steps_per_epoch(args: RunArguments, batches: int) -> int:
    """Optimiser steps in one pass over the data; a last, shorter accumulation counts."""
    return math.ceil(batches / args.gradient_accumulation_steps)


def make_optimizer(
    model: torch.nn.Module, args: RunArguments, undecayed: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW; vectors (biases, norms) and the parameters in ``undecayed`` get no weight decay."""
    exempt = {id(parameter) for parameter in undecayed}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1 and id(parameter) not in exempt]
    rest = [parameter for parameter in trained if parameter.ndim <= 1 or id(parameter) in exempt]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)  # one that FiniteGuard can hold
    return torch.optim.AdamW(groups, lr=args.learning_rate, fused=fused or None)


def make_scheduler(optimizer: torch.optim.Optimizer, args: RunArguments, steps: int) -> Any:
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
        parts: what it trains with.
        identity: what checkpoints say about the run.
        signals: asks the loop to stop; None for a run that nobody stops.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: RunArguments,
        parts: TrainingParts,
        identity: RunIdentity,
        signals: StopSignals | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.args = args
        self.parts = parts
        self.identity = identity
        self.signals = signals or StopSignals()
        self.folder = Path(args.output_dir)
        self.steps_per_epoch = steps_per_epoch(args, len(parts.train_loader))
        self.total_steps = total_steps(args, len(parts.train_loader))
        self._rows = self._rows_of_epoch()
        self.checkpoint_every = (
            self.steps_per_epoch if args.checkpointing_steps == "epoch" else args.checkpointing_steps
        )
        self._weights: list[torch.Tensor] = []
        self._weighs = parts.weight is not None and accelerator.distributed_type != DistributedType.DEEPSPEED
        self.progress = Progress(order=parts.order.get_state())
        self._started = 0.0
        self._bar: tqdm[Any] = tqdm(disable=True)
        measures = "none" if parts.attention.patch is None else args.attention_metrics
        self._measures = AttentionMeasures(accelerator, parts.model, measures)
        self._guard = FiniteGuard(
            *(accelerator, parts.model, parts.optimizer, parts.compute_loss, args.max_grad_norm, self.folder),
            return_to=parts.attention.set_step,
        )

    @property
    def record(self) -> TrainingRecord:
        """What the run measured so far."""
        return self.progress.record

    def resume(self, checkpoint: Path) -> None:
        """Goes back to the state of a checkpoint that was verified; call it last before :meth:`run`."""
        self.progress = load_run(checkpoint, self.accelerator, self.identity)
        self.record.resumed_at.append(self.record.steps)

    def run(self) -> TrainingRecord:
        """Trains for all steps that are left, evaluating on the way and at the end.

        Raises:
            NonFiniteError: a loss or gradient is not finite.
            CheckpointError: a checkpoint could not be written.
            Stopped: a signal arrived; a checkpoint was written.
        """
        show = None if self.accelerator.is_local_main_process else True  # None: only on a terminal
        self._started = time.perf_counter() - self.record.train_seconds - self.record.eval_seconds
        self.parts.model.train()
        self.parts.attention.set_step(self.record.steps)
        with tqdm(total=self.total_steps, initial=self.record.steps, disable=show, desc="train") as self._bar:
            while self.record.steps < self.total_steps:
                self._train_epoch()
        self._read_clock()
        return self.record

    def _train_epoch(self) -> None:
        """Trains to the end of the present epoch, or of the run."""
        state = self.accelerator.gradient_state
        for batch in self._rest_of_epoch():
            self._train_batch(batch)
            self.progress.batches += 1
            if not self.accelerator.sync_gradients:
                continue
            if state.end_of_dataloader:  # its generator has drawn all that it draws in this epoch
                self.progress.epoch, self.progress.batches = self.progress.epoch + 1, 0
                self.progress.order = self.parts.order.get_state()
            self._bar.update()
            self._finish_step()
            if self.record.steps == self.total_steps:
                return

    def _rows_of_epoch(self) -> int | None:
        """The examples of one pass over the data; None where batches do not follow from that number."""
        data: Any = self.parts.train_loader.dataset
        if not hasattr(data, "__len__"):
            return None
        rows, together = len(data), self.args.per_device_train_batch_size * self.accelerator.num_processes
        return rows if len(self.parts.train_loader) == math.ceil(rows / together) else None

    def _rest_of_epoch(self) -> Iterator[Any]:
        """The batches of the epoch that are left; the order is drawn again from the state at its beginning."""
        progress, loader = self.progress, self.parts.train_loader
        self.parts.order.set_state(progress.order)
        loader.set_epoch(progress.epoch)  # type: ignore[attr-defined]  # of Accelerate's loaders
        yield from skip_first_batches(loader, progress.batches) if progress.batches else loader

    def _train_batch(self, batch: Any) -> None:
        parts = self.parts
        batch, count, share = self._own_part(batch)
        weight = None
        if self._weighs and parts.weight is not None:
            weight = parts.weight(batch).float() * (count > 0)
            self._weights.append(weight)
            share = weight / _USUAL_WEIGHT
        self._guard.before_forward(self.record.steps + 1, batch)
        with self.accelerator.accumulate(parts.model):
            due = self.accelerator.sync_gradients and self._logs_at(self.record.steps + 1)
            with self._measures.measuring(due, share):
                loss = parts.compute_loss(parts.model, batch)
            self._guard.after_forward(loss)
            self.accelerator.backward(loss if not self._weighs and share == 1.0 else loss * share)
            if self.accelerator.sync_gradients:
                self._divide_by_weights()
                self._guard.clip()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
        mean = loss.detach().float()
        examples = torch.full_like(mean, count)
        weight = examples if weight is None else weight
        self.progress.losses.append(torch.stack((mean * weight, weight, examples)))
        tokens = count_tokens(batch)
        if tokens is not None:
            self.progress.tokens.append(tokens * (count > 0))

    def _divide_by_weights(self) -> None:
        """Makes the gradients of a step those of the weighted mean of its batches' losses, without waiting for them.

        How much all batches of all processes weigh is known after the last of them only. It stays on the device.
        """
        if not self._weighs:
            return
        total = self.accelerator.reduce(torch.stack(self._weights).sum())
        self._weights.clear()
        summands = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        found = [parameter.grad for parameter in self.parts.model.parameters() if parameter.grad is not None]
        gradients = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in found]
        torch._foreach_mul_(gradients, _USUAL_WEIGHT * summands / total)

    def _own_part(self, batch: Any) -> tuple[Any, int, float]:
        """A batch without the rows that fill it up, how many are left, and what multiplies its mean loss.

        The loop divides the loss by the batches of a whole accumulation and the processes average their gradients.
        With this factor, which is 1 but at the end of an epoch, an optimiser step follows the mean loss over all its
        examples, each once: not more the fewer there are in a batch, not less where batches are missing, and not
        those that Accelerate takes again from the beginning so that all processes have as many. A process that has
        nothing but these runs them with the factor 0, for the others wait for it.
        """
        size, first = self.args.per_device_train_batch_size, self.progress.batches
        if self._rows is None:
            return batch, size, 1.0
        together, per_step = size * self.accelerator.num_processes, self.args.gradient_accumulation_steps
        own = min(size, max(0, self._rows - first * together - self.accelerator.process_index * size))
        begin = first - first % per_step
        examples = min(per_step * together, self._rows - begin * together)
        kept = {key: value[:own] for key, value in batch.items()} if 0 < own < size else batch
        return kept, own, own * per_step * self.accelerator.num_processes / examples

    def _finish_step(self) -> None:
        """Counts an optimiser step; logs, sets the temperature of the next one, evaluates, saves and stops if due."""
        args, record, scheduler = self.args, self.record, self.parts.scheduler
        learning_rate = scheduler.get_last_lr()[0]
        record.steps += 1
        if not self.parts.optimizer.step_was_skipped:
            scheduler.step()
        last, logs = record.steps == self.total_steps, self._logs_at(record.steps)
        evaluates = last or record.steps % (args.eval_steps or self.steps_per_epoch) == 0
        saves = self.checkpoint_every is not None and record.steps % self.checkpoint_every == 0
        if logs or evaluates or self._guard.full:
            self._guard.check()
        if logs:
            self._log(learning_rate)
        self.parts.attention.set_step(record.steps)
        if evaluates:
            self._evaluate(last)
        stops = not last and self._asked_to_stop(logs)  # a signal may have come during the evaluation
        if saves or stops:
            self._guard.check()
            checkpoint = self._save()
        if stops:
            raise Stopped(self.signals.received or "a signal to another process", record.steps, checkpoint)

    def _logs_at(self, step: int) -> bool:
        return step == self.total_steps or step % self.args.logging_steps == 0

    def _asked_to_stop(self, logs: bool) -> bool:
        """Whether a signal arrived; several processes agree on that when they log, to wait for no other then."""
        received = self.signals.received is not None
        if self.accelerator.distributed_type == DistributedType.NO:
            return received
        if not logs:
            return False
        flag = torch.tensor(float(received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag).item())

    def _log(self, learning_rate: float) -> None:
        """Adds the mean loss since the last entry, over all processes, to the series."""
        total, weight, count = self.accelerator.reduce(torch.stack(self.progress.losses).sum(0))
        loss = (total / weight).item()
        tokens = None
        if self.progress.tokens:
            tokens = int(self.accelerator.reduce(torch.stack(self.progress.tokens).sum()).item())
        self.progress.losses.clear()
        self.progress.tokens.clear()
        step = self.record.steps
        tau = self.parts.attention.tau(step - 1)
        entry = {"step": step, "epoch": self._epoch(), "tau": tau, "loss": loss, "learning_rate": learning_rate}
        self.record.train.append(entry | self._measures.read())
        self._tell(self._rates(count.item(), tokens))

    def _tell(self, rates: dict[str, float]) -> None:
        """Tells trackers and progress bar of the last entry."""
        entry = self.record.train[-1]
        self.accelerator.log(train_values(entry, rates), step=entry["step"])
        self._bar.set_postfix_str(bar_text(entry, rates))

    def _rates(self, examples: float, tokens: int | None) -> dict[str, float]:
        """Counts the tokens; examples and, if the batches tell them, tokens per second since the last entry."""
        now = self._train_seconds()
        seconds, self.progress.logged_at = now - self.progress.logged_at, now
        rates = {"examples_per_second": examples / seconds}
        if tokens is None or self.record.tokens is None:
            self.record.tokens = None
        else:
            self.record.tokens += tokens
        return rates if tokens is None else rates | {"tokens_per_second": tokens / seconds}

    def _evaluate(self, last: bool) -> None:
        """Evaluates in all modes due; draws from a stream of its own, which repeats for a seed and a step."""
        self._synchronize()
        started = time.perf_counter()
        parts, step = self.parts, self.record.steps
        for mode in parts.attention.evaluation_modes(last):
            rank = self.accelerator.process_index
            with isolated_rng(self.accelerator.device, self.args.seed, step, rank), parts.attention.evaluating(mode):
                metrics = parts.evaluate(self.accelerator, sampling(parts.model, mode), parts.eval_loader)
            place = {"step": step, "epoch": self._epoch(), "tau": parts.attention.tau(step), "mode": mode.name}
            self.record.evaluation.append({**place, **metrics})
            numbers = self.record.final[mode.name] = numbers_of(metrics)
            self.accelerator.log(evaluation_values(place | numbers), step=step)
            if self.accelerator.is_main_process:
                words = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
                tqdm.write(f"step {step}/{self.total_steps}, {mode.name}: {words}")
        self._synchronize()
        self.record.eval_seconds += time.perf_counter() - started

    def _save(self) -> Path:
        self._read_clock()
        parts = self.parts

        def write(folder: Path) -> None:
            save_run(folder, self.accelerator, self.identity, self.progress, parts.model, parts.attention)

        return write_checkpoint(self.folder, self.record.steps, write, self.args.keep_last, self.accelerator)

    def _epoch(self) -> float:
        return self.record.steps / self.steps_per_epoch

    def _read_clock(self) -> None:
        self._synchronize()
        self.record.train_seconds = self._train_seconds()

    def _train_seconds(self) -> float:
        return time.perf_counter() - self._started - self.record.eval_seconds

    def _synchronize(self) -> None:
        """Waits for the GPU, so that a clock read after it counts finished work."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
