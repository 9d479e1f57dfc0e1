"""The attention under test: patching, the course of the temperature, noise in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any

import torch

import gumbel_attention as ga
from harness.arguments import RunArguments
from harness.errors import UsageError
from harness.evaluation import NOISE_OFF, EvaluationMode, evaluation_modes
from harness.fixed_keys import fix_keys
from harness.hardening import Hardening
from harness.library_layers import LibraryLayers, has_library_layers


def attention_config(args: RunArguments) -> ga.GumbelAttentionConfig | None:
    """The library's configuration of the run; None for ``attention: unpatched``.

    Raises:
        UsageError: the library refuses a setting.
    """
    if args.attention == "unpatched":
        return None
    try:
        return ga.GumbelAttentionConfig(
            tau=args.tau,
            hard=args.hard,
            noise=args.noise,
            noise_scale=args.noise_scale,
            estimator=args.estimator,
            samples=args.samples,
            top_k=args.top_k,
            eval_noise=args.eval_noise,
            eval_hard=args.eval_hard,
            learn_tau=args.learn_tau,
            layers=args.layers,
            heads=args.heads,
            impl=args.impl,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"attention settings: {error}") from error


class AttentionControl:
    """What the loop does to the attention: temperature by step, noise by evaluation mode.

    Args:
        patch: the patch of the model; None for the model's own attention.
        schedule: optimiser step to temperature; None where it is learned.
        noise_at_test: what evaluation with noise switches on: the layers' own noise (True) or a family.
        noise_scale: optimiser step to what multiplies the noise; None where it stays as it is.
        modes: the ways to evaluate a patched model; None is with noise off and on.
        modes_between: those before the last step; None is all of them.
        hardening: which layers are hard by step; None where that stays as it is.
    """

    def __init__(
        self,
        patch: Any = None,
        schedule: Callable[[int], float] | None = None,
        noise_at_test: bool | str = True,
        noise_scale: Callable[[int], float] | None = None,
        modes: Sequence[str] | None = None,
        modes_between: Sequence[str] | None = None,
        hardening: Hardening | None = None,
    ) -> None:
        self.patch = patch
        self._noise_scale = noise_scale
        self._modes = modes
        self._modes_between = modes_between
        self._hardening = hardening
        self._schedule = schedule
        self._noise_at_test = noise_at_test

    def tau(self, step: int) -> float | None:
        """The scheduled temperature at an optimiser step, or the mean of the learned ones as they are now.

        None for the model's own attention, which has none.
        """
        if self.patch is None:
            return None
        if self._schedule is not None:
            return self._schedule(step)
        return torch.cat([tau.reshape(-1) for tau in self.patch.tau]).mean().item()

    def set_step(self, step: int) -> None:
        """Sets the temperature, the noise scale and the hardness of this optimiser step in every patched layer."""
        if self._schedule is not None:
            self.patch.set_tau(self._schedule(step))
        if self._noise_scale is not None:
            self.patch.set_noise_scale(self._noise_scale(step))
        if self._hardening is not None:
            self._hardening.apply(self.patch, step)

    def save(self, model: torch.nn.Module, folder: str | PathLike[str]) -> None:
        """Writes the settings and temperatures of the attention into ``folder``, a patch's for ``ga.load_patch``."""
        if isinstance(self.patch, LibraryLayers):
            self.patch.save(folder)
        elif self.patch is not None:
            ga.save_patch(model, folder)

    def learned_parameters(self) -> list[torch.nn.Parameter]:
        """The learned temperatures."""
        return [] if self.patch is None else list(self.patch.learned_tau_parameters())

    def evaluation_modes(self, last: bool = True) -> list[EvaluationMode]:
        """The ways to evaluate after the last step, or before it; a model that is not patched has one."""
        modes = self._modes if last or self._modes_between is None else self._modes_between
        return evaluation_modes([NOISE_OFF] if self.patch is None else modes)

    @contextmanager
    def evaluating(self, mode: EvaluationMode) -> Iterator[None]:
        """Within this context the attention runs in ``mode``; the state before comes back after it."""
        with ExitStack() as stack:
            if self.patch is not None:
                stack.enter_context(self.patch.noise(mode.noise and self._noise_at_test))
                if mode.hard is not None:
                    stack.enter_context(self.patch.hard(mode.hard))
            yield


def control_attention(
    model: torch.nn.Module, args: RunArguments, config: ga.GumbelAttentionConfig | None, steps: int
) -> AttentionControl:
    """Patches the model in place as configured, with the temperature's course over ``steps`` optimiser steps.

    A model that has attention layers of the library is left as its task made it, and they are controlled.

    An arm trained without noise is evaluated with Gumbel noise where a mode has noise.

    Raises:
        UsageError: the attention of this model cannot be patched as configured.
    """
    if config is None:
        if args.fixed_keys != "none":
            fix_keys(model, args.fixed_keys, args.seed)
        return AttentionControl()
    patch: Any
    try:
        patch = LibraryLayers(model) if has_library_layers(model) else ga.patch_model(model, config)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the model cannot be patched: {error}") from error
    schedule = None
    if args.learn_tau is None:
        tau_end = args.tau if args.tau_end is None else args.tau_end
        if args.tau_schedule == "clipped_exponential":
            own = {"rate": args.tau_rate, "every": args.tau_every}
            schedule = ga.temperature_schedule(args.tau_schedule, args.tau, tau_end, **own)
        else:
            schedule = ga.temperature_schedule(args.tau_schedule, args.tau, tau_end, steps)
    return AttentionControl(
        patch,
        schedule,
        noise_at_test="gumbel" if config.noise == "none" else True,
        noise_scale=None if args.noise_scale_end is None else _linear(args.noise_scale, args.noise_scale_end, steps),
        modes=args.eval_modes,
        modes_between=args.eval_modes_between,
        hardening=_hardening(args, patch, steps),
    )


def _hardening(args: RunArguments, patch: Any, steps: int) -> Hardening | None:
    if args.harden == "none":
        return None
    if isinstance(patch, LibraryLayers):
        raise UsageError("harden is for the layers of a patched model; this one has layers of the library.")
    start, end = args.harden_start or 0.0, args.harden_end
    return Hardening(args.harden, start, start if end is None else end, len(patch.layers), steps)


def _linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    """From ``start`` at step 0 to ``end`` at the last of ``steps`` steps; may end at 0, unlike a temperature."""
    return lambda step: start + (end - start) * min(1.0, step / max(1, steps - 1))
