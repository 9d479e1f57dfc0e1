"""The training loop against the bare steps of the same model: timed in turns, in one run, on the same batches.

A task that stands between the script and its own task takes every second stop before a forward pass to do, with a copy
of the model, the two steps that the loop has just done and is about to do: loop, bare, bare, loop, and so on. What
slows the machine down slows both. The copy gets the batches, the random state and the temperatures that the loop's
steps had, so in the end both have the same weights, to the bit; :attr:`TurnTaking.same_weights` says whether they do.
"""

from __future__ import annotations

import copy
import cProfile
import dataclasses
import statistics
import time
import traceback
from collections import Counter
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gumbel_attention as ga
from harness.arguments import RunArguments
from harness.loop import make_optimizer, make_scheduler
from harness.run import Task
from harness.timing import wait

FETCHES = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")
"""Methods of a tensor that wait for a device."""
_LOADING = ("torch/utils/data/", "accelerate/data_loader.py")  # its tensors are on the CPU in any case
_RESAMPLES = 2000


class Watched:
    """A task whose steps are watched and whose evaluations are empty; the first method to change is a subclass's.

    Args:
        task: does the work.
        args: the settings of the run.
    """

    samples_loss = True

    def __init__(self, task: Task, args: RunArguments) -> None:
        self.task = task
        self.args = args

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def evaluate(self, accelerator: Any, model: torch.nn.Module, loader: Any) -> dict[str, float]:
        """No evaluation."""
        return {}


@dataclasses.dataclass
class _Seen:
    """A step of the loop: its batch, and the random state and temperatures before it."""

    batch: Any
    random: torch.Tensor
    device_random: torch.Tensor | None
    taus: list[float]


class TurnTaking(Watched):
    """Times the loop's steps and the bare ones in turns.

    A step of the loop is all that lies between one forward pass and the next, loading and logging included.

    Attributes:
        loop: seconds of each of the loop's steps but the last.
        bare: seconds of each bare step.
    """

    def __init__(self, task: Task, args: RunArguments) -> None:
        super().__init__(task, args)
        self.loop: list[float] = []
        self.bare: list[float] = []
        self.tokens: list[int] = []
        self._began: float | None = None
        self._pending: list[_Seen] = []
        self._model: Any = None

    def compute_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The loss, after the bare steps if it is their turn."""
        device = next(model.parameters()).device
        wait(device)
        if self._began is not None:
            self.loop.append(time.perf_counter() - self._began)
        if self._model is None:
            self._copy(model)
        self.tokens.append(batch["input_ids"].numel())
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        now = _Seen(batch, torch.get_rng_state(), on_device, [tau.item() for tau in ga.patch_of(model).tau])
        self._pending.append(now)
        if len(self._pending) == 2:
            for seen in self._pending:
                self._bare_step(seen, device)
            self._pending.clear()
            _set_random(now, device)
        wait(device)
        self._began = time.perf_counter()
        return self.task.compute_loss(model, batch)

    def same_weights(self) -> bool:
        """Whether loop and bare steps ended with the same weights, to the bit; ask when the run is over."""
        while self._pending:
            seen = self._pending.pop(0)
            self._bare_step(seen, seen.batch["input_ids"].device)
        theirs, ours = self._original.state_dict(), self._model.state_dict()
        return all(torch.equal(theirs[name], ours[name]) for name in theirs)

    def _copy(self, model: torch.nn.Module) -> None:
        self._original, self._model = model, copy.deepcopy(model)
        self._optimizer = make_optimizer(self._model, self.args, undecayed=[])
        assert self.args.max_train_steps is not None
        self._scheduler = make_scheduler(self._optimizer, self.args, self.args.max_train_steps)

    def _bare_step(self, seen: _Seen, device: torch.device) -> None:
        ga.patch_of(self._model).set_tau(seen.taus[0])
        _set_random(seen, device)
        wait(device)
        began = time.perf_counter()
        self.task.compute_loss(self._model, seen.batch).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self.args.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        wait(device)
        self.bare.append(time.perf_counter() - began)


class Profiled(Watched):
    """Profiles the loop after its first entry in the series.

    Attributes:
        profile: of all steps after those.
        steps: their number.
    """

    def __init__(self, task: Task, args: RunArguments) -> None:
        super().__init__(task, args)
        self.profile = cProfile.Profile()
        self.steps = -args.logging_steps

    def compute_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The loss."""
        if self.steps == 0:
            self.profile.enable()
        self.steps += 1
        return self.task.compute_loss(model, batch)

    def evaluate(self, accelerator: Any, model: torch.nn.Module, loader: Any) -> dict[str, float]:
        """Ends the profile: the steps are over."""
        self.profile.disable()
        return {}


class FetchCounting(Watched):
    """Counts by step what would wait for a device; of the data, which are made on the CPU in any case, nothing.

    Use it as a context around the run.

    Attributes:
        steps: for each step of the loop, caller -> calls; ``"model"`` is the forward pass.
    """

    def __init__(self, task: Task, args: RunArguments) -> None:
        super().__init__(task, args)
        self.steps: list[Counter[str]] = []
        self._mode = _FetchMode(self._note)

    def __enter__(self) -> FetchCounting:
        self._methods = {name: getattr(torch.Tensor, name) for name in ("cpu", "numpy", "tolist")}
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, self._noting(method))
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, method)

    def compute_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The loss."""
        self.steps.append(Counter())
        return self.task.compute_loss(model, batch)

    def between_logs(self) -> Counter[str]:
        """Calls of all steps after which nothing is logged, evaluated or saved."""
        every = self.args.logging_steps
        return sum((calls for step, calls in enumerate(self.steps[:-1], 1) if step % every), Counter())

    def _noting(self, method: Any) -> Any:
        def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._note()
            return method(tensor, *args, **kwargs)

        return noted

    def _note(self) -> None:
        frames = traceback.extract_stack()
        if not self.steps or any(part in frame.filename for frame in frames for part in _LOADING):
            return
        inside = [frame for frame in frames if PurePath(frame.filename).parent.name in ("harness", "tasks")]
        inside = [frame for frame in inside if frame.filename != __file__ or frame.name == "compute_loss"]
        forward = any(frame.name == "compute_loss" for frame in inside)
        self.steps[-1]["model" if forward else inside[-1].name if inside else "elsewhere"] += 1


class _FetchMode(TorchDispatchMode):
    """Calls ``note`` where a number is taken from a tensor: ``item()``, ``bool()``, ``float()``."""

    def __init__(self, note: Any) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._note()
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class Overhead:
    """What the loop takes beyond the bare steps, in percent of these.

    Attributes:
        percent: of all steps together.
        low: lower end of the 95 % interval, by resampling blocks of steps.
        high: its upper end.
        median: of the blocks' own percentages.
        quartiles: of them.
        blocks: their number.
    """

    percent: float
    low: float
    high: float
    median: float
    quartiles: tuple[float, float]
    blocks: int


def overhead(loop: list[float], bare: list[float], block: int) -> Overhead:
    """The overhead, in blocks of ``block`` steps, of which the first is passed over.

    Args:
        loop: seconds of the loop's steps.
        bare: seconds of the bare steps, of the same batches.
        block: steps between two entries of the series, so that each block has one.

    Raises:
        ValueError: fewer than three blocks are left.
    """
    blocks = min(len(loop), len(bare)) // block
    if blocks < 4:
        raise ValueError(f"expected at least 4 blocks of {block} steps, got {blocks}.")
    sums = np.array([[sum(times[i * block : (i + 1) * block]) for i in range(1, blocks)] for times in (loop, bare)])
    picks = np.random.default_rng(0).integers(blocks - 1, size=(_RESAMPLES, blocks - 1))
    resampled = sums[:, picks].sum(-1)
    low, high = np.quantile(resampled[0] / resampled[1], (0.025, 0.975))
    first, middle, third = statistics.quantiles((sums[0] / sums[1]).tolist(), n=4, method="inclusive")
    quartiles = (_percent(first), _percent(third))
    total = float(sums[0].sum() / sums[1].sum())
    return Overhead(_percent(total), _percent(low), _percent(high), _percent(middle), quartiles, blocks - 1)


def _percent(ratio: float) -> float:
    return 100 * (float(ratio) - 1)


def _set_random(seen: _Seen, device: torch.device) -> None:
    torch.set_rng_state(seen.random)
    if seen.device_random is not None:
        torch.cuda.set_rng_state(seen.device_random, device)
