"""Gumbel attention in a run of transformers' ``Trainer``: schedules, logs, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ..patched_state import PatchedState
from .patch import ModelPatch, patched_modules
from .saving import gathered_patch, patch_of


class GumbelAttentionCallback(TrainerCallback):
    """Anneals the temperature of a patched model in transformers' ``Trainer``, logs it, and saves the patch.

    ::

        trainer = Trainer(model=model, args=args, train_dataset=data)
        ga.GumbelAttentionCallback(tau=ga.temperature_schedule("exponential", 2.0, 0.1, steps=1000)).attach(trainer)
        trainer.train()

    After n optimiser steps the temperature is ``tau(n)``: step n + 1 runs at it, and the evaluation, the log entry and
    the checkpoint of step n have it. It depends on the step alone, so that a resumed run goes on where the other was.
    A model taken back from its best checkpoint gets the temperature of that checkpoint.

    Handed over as ``Trainer(callbacks=[...])`` it does all this but two things, for which Trainer offers callbacks no
    way: its log entries come after the trackers have written theirs (``state.log_history`` and the console have
    them), and learned temperatures are not kept out of weight decay, which is an error where there is one.

    Args:
        tau: gives the temperature after so many steps, as :func:`gumbel_attention.temperature_schedule` makes it;
            ``None`` leaves it as it is. Layers that learn their temperature keep their own.
        noise: says whether there is noise after so many steps: ``True`` is as the settings and the mode have it,
            ``False`` is off. At the end of training the switch is back where it was. ``None`` leaves it as it is.
        noise_scale: gives what multiplies the noise after so many steps; ``None`` leaves it as it is.

    Raises:
        TypeError: an argument is neither ``None`` nor a function of the step.
    """

    def __init__(
        self,
        tau: Callable[[int], float] | None = None,
        noise: Callable[[int], bool] | None = None,
        noise_scale: Callable[[int], float] | None = None,
    ) -> None:
        for name, schedule in (("tau", tau), ("noise", noise), ("noise_scale", noise_scale)):
            if schedule is not None and not callable(schedule):
                raise TypeError(f"{name} must be None or a function of the training step, got {schedule!r}.")
        self.tau = tau
        self.noise = noise
        self.noise_scale = noise_scale
        self._noise_before: dict[PatchedState, bool | str | None] = {}

    def attach(self, trainer: Any) -> GumbelAttentionCallback:
        """Puts the callback before the trainer's others and learned temperatures out of its weight decay.

        Args:
            trainer: a ``transformers.Trainer`` that has not created its optimiser yet.

        Returns:
            The callback itself.

        Raises:
            ValueError: the trainer's model is not patched.
        """
        patch_of(trainer.model)
        handler = trainer.callback_handler
        handler.callbacks = [self, *(other for other in handler.callbacks if other is not self)]
        decaying = trainer.get_decay_parameter_names

        def without_learned_tau(model: nn.Module) -> list[str]:
            learned = {id(parameter) for parameter in patch_of(model).learned_tau_parameters()}
            names = {name for name, parameter in model.named_parameters() if id(parameter) in learned}
            return [name for name in decaying(model) if name not in names]

        trainer.get_decay_parameter_names = without_learned_tau
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the temperature and the noise of the first step; raises where the patch and the run do not fit."""
        patch = patch_of(kwargs["model"])
        _refuse_decay(patch, kwargs.get("optimizer"))
        self._noise_before = {}
        self._set(kwargs["model"], state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the temperature and the noise of the step to come."""
        self._set(kwargs["model"], state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets what the evaluation and the checkpoint after this step have."""
        self._set(kwargs["model"], state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the temperatures, and what else has a schedule, to the entries of training steps."""
        if logs is None or "loss" not in logs:
            return
        entries = _temperatures(patch_of(kwargs["model"]))
        if self.tau is not None:
            entries["tau"] = float(self.tau(state.global_step))
        if self.noise is not None:
            entries["noise"] = float(self.noise(state.global_step))
        if self.noise_scale is not None:
            entries["noise_scale"] = float(self.noise_scale(state.global_step))
        logs.update(entries)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(entries)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the patch beside weights that come without the model's config, such as PEFT's adapters."""
        content = gathered_patch(kwargs["model"])  # in every process: the temperatures may be sharded
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and folder.is_dir() and not (folder / CONFIG_NAME).exists():
            content.write(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the model with the temperature of its weights, and the noise switch as it was before."""
        best = state.best_global_step if args.load_best_model_at_end else None
        self._set(kwargs["model"], state.global_step if best is None else best)
        for attention, override in self._noise_before.items():
            attention.noise_override = override
        self._noise_before = {}

    def _set(self, model: nn.Module, step: int) -> None:
        patch = patch_of(model)
        if self.tau is not None:
            patch.set_tau(self.tau(step))
        if self.noise is not None:
            for _, _, attention in patched_modules(model):
                self._noise_before.setdefault(attention, attention.noise_override)
            patch.noise(None if self.noise(step) else False)
        if self.noise_scale is not None:
            patch.set_noise_scale(self.noise_scale(step))


def _refuse_decay(patch: ModelPatch, optimizer: torch.optim.Optimizer | None) -> None:
    learned = {id(parameter) for parameter in patch.learned_tau_parameters()}
    for group in [] if optimizer is None else optimizer.param_groups:
        if group.get("weight_decay") and any(id(parameter) in learned for parameter in group["params"]):
            raise ValueError(
                f"the optimiser would decay learned temperatures by {group['weight_decay']}, towards tau = 1: call "
                "GumbelAttentionCallback(...).attach(trainer) before trainer.train(), or put "
                "patch_of(model).learned_tau_parameters() into a parameter group with weight_decay 0."
            )


def _temperatures(patch: ModelPatch) -> dict[str, float]:
    """The temperatures in force: ``tau``, or its range where layers differ; of learned ones mean and range."""
    scheduled = {tau.item() for tau in patch.tau if tau.ndim == 0}
    learned = [tau for tau in patch.tau if tau.ndim > 0]
    entries: dict[str, float] = {}
    if scheduled:
        low, high = min(scheduled), max(scheduled)
        entries = {"tau": low} if low == high else {"tau_min": low, "tau_max": high}
    if learned:
        values = torch.cat(learned)
        entries["learned_tau_mean"] = values.mean().item()
        entries["learned_tau_min"] = values.min().item()
        entries["learned_tau_max"] = values.max().item()
    return entries
