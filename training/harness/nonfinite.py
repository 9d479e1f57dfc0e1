"""Losses and gradients that are not finite: the run stops with its weights as they were, and the layer is named.

Nothing is read from the device at every step. Whether a gradient is finite stays there, as a flag that makes the
fused optimiser pass over its update, that one and all that follow; :meth:`FiniteGuard.check` reads it where the loop
waits for the device anyway. The batch is then run again on those weights, with the noise and dropout it had.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import send_to_device

ComputeLoss = Callable[[torch.nn.Module, Any], torch.Tensor]
"""(model, batch) -> mean loss of the batch."""

WINDOW = 256
"""Most batches that are kept for a second look; the loop checks when there are as many."""
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class NonFiniteError(FloatingPointError):
    """A loss or gradient is not finite; the message names the step, the layer and the file with the batch."""


@dataclasses.dataclass
class _Seen:
    """A batch of the window: its optimiser step, counted from 1, its loss, and the random states before it."""

    step: int
    batch: Any
    cpu_state: torch.Tensor
    device_state: torch.Tensor | None
    loss: torch.Tensor | None = None


class FiniteGuard:
    """Watches the batches and gradients of a run.

    With fp16 the gradient scaler passes over updates, overflow being part of its search; sharded optimisers take no
    flag. There only losses are checked, and with sharding the weights may have changed when the layer is sought.

    Args:
        accelerator: of the run.
        model: prepared.
        optimizer: prepared.
        compute_loss: of the run.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        folder: gets the offending batch.
        return_to: sets what else depends on the optimiser step, such as the temperature, as it was after that step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: Any,
        compute_loss: ComputeLoss,
        max_grad_norm: float,
        folder: Path,
        return_to: Callable[[int], None],
    ) -> None:
        self._accelerator = accelerator
        self._model = model
        self._compute_loss = compute_loss
        self._max_grad_norm = max_grad_norm
        self._folder = folder
        self._return_to = return_to
        self._window: list[_Seen] = []
        self._norms: list[torch.Tensor] = []
        self._bad = torch.zeros((), device=accelerator.device)
        raw = getattr(optimizer, "optimizer", optimizer)
        sharded = accelerator.distributed_type in _SHARDED
        self._guards = accelerator.scaler is None and not sharded and bool(raw.defaults.get("fused"))
        if self._guards:
            raw.found_inf = self._bad

    @property
    def full(self) -> bool:
        """Whether the window holds as many batches as it may."""
        return len(self._window) >= WINDOW

    def before_forward(self, step: int, batch: Any) -> None:
        """Keeps a batch of the optimiser step ``step``, counted from 1."""
        device = self._accelerator.device
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._window.append(_Seen(step, batch, torch.get_rng_state(), state))

    def after_forward(self, loss: torch.Tensor) -> None:
        """Keeps the loss of the last batch."""
        self._window[-1].loss = loss.detach()

    def clip(self) -> None:
        """Clips the gradients of an optimiser step; if they are not finite, this update and all others are off."""
        if self._max_grad_norm > 0:
            norm = self._accelerator.clip_grad_norm_(self._model.parameters(), self._max_grad_norm)
        elif self._guards:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None])
        if self._guards:
            self._norms.append(norm.detach())
            self._bad.copy_(torch.maximum(self._bad, (~norm.isfinite()).float()))

    def check(self) -> None:
        """Waits for the device; forgets the window if all was finite. All processes call this together.

        Raises:
            NonFiniteError: a gradient or a loss was not.
        """
        if not self._window:
            return
        losses = torch.stack([seen.loss for seen in self._window if seen.loss is not None]).float()
        bad = {seen.step for seen, finite in zip(self._window, losses.isfinite().tolist(), strict=True) if not finite}
        if self._norms:
            steps, finite_norms = sorted({seen.step for seen in self._window}), torch.stack(self._norms).isfinite()
            bad |= {step for step, finite in zip(steps, finite_norms.tolist(), strict=True) if not finite}
        somewhere = self._accelerator.reduce(torch.tensor(float(bool(bad)), device=self._bad.device))
        if somewhere.item():
            raise NonFiniteError(self._report(min(bad)) if bad else "not finite on another process, which says more.")
        self._window.clear()
        self._norms.clear()

    def _report(self, step: int) -> str:
        """Runs the batches of a step again, saves the one that is to blame, and says what was found."""
        seen = [seen for seen in self._window if seen.step == step]
        losses = [seen.loss.item() for seen in seen if seen.loss is not None]
        number = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)
        what = "gradient is not finite" if number is None else f"training loss is {losses[number]}"
        self._return_to(step - 1)
        self._model.zero_grad()
        place = None
        for index in range(len(seen)) if number is None else [number]:
            place = self._first_not_finite(seen[index])
            if place is not None:
                number = index
                break
        found = f"first not finite is {place}" if place else "no layer shows it when the batches are run again"
        path = self._save(step, seen[number or 0], place)
        return (
            f"the {what} at step {step}: {found}. Batch {(number or 0) + 1} of the step's {len(seen)} is in {path}. "
            "Possible cures: lower learning_rate, raise tau, or check mixed_precision."
        )

    def _first_not_finite(self, seen: _Seen) -> str | None:
        """What first leaves the finite numbers in the forward and backward pass over a batch."""
        torch.set_rng_state(seen.cpu_state)
        if seen.device_state is not None:
            torch.cuda.set_rng_state(seen.device_state, self._accelerator.device)
        model = self._accelerator.unwrap_model(self._model, keep_torch_compile=False)
        with _watching(model) as places:
            loss = self._compute_loss(model, seen.batch)
            if not places and not loss.isfinite():
                return "the loss, computed from finite outputs of all layers"
            if not places:
                self._accelerator.backward(loss)
        parameters = model.named_parameters()
        places += [f"the gradient of {name}" for name, parameter in parameters if not _finite(parameter.grad)]
        return places[0] if places else None

    def _save(self, step: int, seen: _Seen, place: str | None) -> Path:
        rank = f"-process-{self._accelerator.process_index}" if self._accelerator.num_processes > 1 else ""
        path = self._folder / f"nonfinite-step-{step}{rank}.pt"
        batch = dict(seen.batch) if isinstance(seen.batch, Mapping) else seen.batch
        torch.save({"step": step, "first": place, "batch": send_to_device(batch, "cpu")}, path)
        return path


@contextmanager
def _watching(model: torch.nn.Module) -> Iterator[list[str]]:
    """Within this context the list gets what is not finite, in the order of the computation: outputs, gradients."""
    places: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(gradient: torch.Tensor) -> None:
            if not _finite(gradient):
                places.append(f"the gradient of the output of {name}")

        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not _finite(tensor):
                    places.append(f"the output of {name}")
                elif tensor.requires_grad:
                    tensor.register_hook(look)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield places
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in a layer's output."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or bool(tensor.isfinite().all())
