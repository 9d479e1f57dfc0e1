"""A patch in force: the handle for its temperatures, its noise and its undo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...selection import PatchedLayer
from ..patched_state import PatchedState, state_of, stop_following
from ..rewriting import notes
from .model_views import refresh_views

_LAYER_STRIDE = 0x5851F42D4C957F2D
"""Odd, so that different seeds stay different; large, so that those of two layers of a model do not meet."""


class PatchedModule(NamedTuple):
    """One patched layer with its module and the module's state."""

    layer: PatchedLayer
    module: nn.Module
    state: PatchedState


class ModelPatch:
    """A patch in force, as :func:`patch_model` returns it."""

    def __init__(self, model: nn.Module, patched: Sequence[PatchedModule]) -> None:
        self._model = model
        self._patched = list(patched)

    @classmethod
    def put_in(cls, model: nn.Module, patched: Sequence[PatchedModule]) -> ModelPatch:
        """Patches the modules with their states, as the latest patch of the model."""
        number = 1 + max((state.patch_number for state in _states_in(model)), default=0)
        for layer, module, state in patched:
            state.patch_number = number
            state.enter(module)
            parent, _, name = layer.name.rpartition(".")
            state.follow(model.get_submodule(parent), name)
        refresh_views(model)
        return cls(model, patched)

    @property
    def layers(self) -> list[PatchedLayer]:
        """The patched layers; printable."""
        return [entry.layer for entry in self._patched]

    @property
    def _states(self) -> list[PatchedState]:
        return [entry.state for entry in self._patched]

    @property
    def tau(self) -> list[Tensor]:
        """The current temperature of each patched layer."""
        return [state.tau.detach().clone() for state in self._states]

    def set_tau(self, tau: float) -> _Restore:
        """Sets the temperature of the patched layers that do not learn theirs; as a context manager, until its end.

        Raises:
            TypeError, ValueError: ``tau`` is not a finite number > 0.
            RuntimeError: all layers learn their temperature.
        """
        self._check_in_force()
        scheduled = [state for state in self._states if state.log_tau is None] or self._states
        for state in scheduled:
            state.check_tau(tau)
        before = [state.tau.clone() for state in scheduled]
        for state in scheduled:
            state.set_tau(tau)

        def restore() -> None:
            for state, value in zip(scheduled, before, strict=True):
                state.set_tau(value.item())

        return _Restore(restore)

    def set_noise_scale(self, noise_scale: float) -> _Restore:
        """Sets what multiplies the noise of the patched layers; as a context manager, until its end.

        Raises:
            TypeError, ValueError: ``noise_scale`` is not a finite number >= 0.
            RuntimeError: a layer's settings have ``noise_scale=0``.
        """
        self._check_in_force()
        for state in self._states:
            state.check_noise_scale(noise_scale)
        before = [state.noise_scale.clone() for state in self._states]
        for state in self._states:
            state.set_noise_scale(noise_scale)

        def restore() -> None:
            for state, value in zip(self._states, before, strict=True):
                state.set_noise_scale(value.item())

        return _Restore(restore)

    def noise(self, on: bool | str | None) -> _Restore:
        """Switches the noise, whatever the mode; as a context manager, until its end.

        Args:
            on: ``False`` is off; ``True`` is each layer's own noise; the name of a family is that noise in every
                patched layer; ``None`` goes back to noise in training and, with ``eval_noise``, in eval.

        Raises:
            TypeError, ValueError: not one of these, or ``True`` for a layer whose settings have no noise.
        """
        self._check_in_force()
        for state in self._states:
            state.check_override(on)
        return self._set("noise_override", [on] * len(self._states))

    def hard(self, on: bool | None, layers: Sequence[int] | None = None) -> _Restore:
        """Makes the choice hard or soft, whatever the mode; as a context manager, until its end.

        Args:
            on: ``True`` picks one key, ``False`` averages; ``None`` goes back to the settings.
            layers: places in :attr:`layers`, which may count from the end; ``None`` is all of them.

        Raises:
            TypeError: ``on`` is something else.
            IndexError: there is no such layer.
        """
        self._check_in_force()
        switches = [state.hard_override for state in self._states]
        for place in range(len(switches)) if layers is None else layers:
            self._states[place].check_hard(on)
            switches[place] = on
        return self._set("hard_override", switches)

    def seeds(self, seeds: Tensor | None) -> _Restore:
        """Gives each example of the next calls its own noise; as a context manager, until its end.

        An example's noise, and the dropout of its attention weights, then depend on its seed, the layer, the head and
        the positions of query and key alone, not on the batch it is in, and repeat with the seed. A position counts
        the tokens of its sequence from the first that a query sees: padding on either side changes nothing, and steps
        with a cache draw what the whole sequence would, if the cache was filled under seeds. Not so: queries of a
        decoder that is padded on the left, where they attend to an encoder, and layers that call
        scaled_dot_product_attention themselves, count from the left of the batch; layers whose softmax is rewritten
        refuse seeds for their noise, and their dropout is the model's own, which seeds do not fix.

        Args:
            seeds: int64 (B,); ``None`` goes back to noise drawn anew in every call.

        Raises:
            TypeError: the seeds are not such a tensor.
            NotImplementedError: in a later call: a layer uses a cache and does not show its tokens' positions.
        """
        self._check_in_force()
        if seeds is None:
            return self._set("seeds", [None] * len(self._states))
        if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1:
            got = (seeds.dtype, tuple(seeds.shape)) if isinstance(seeds, Tensor) else seeds
            raise TypeError(f"seeds must be an int64 tensor of shape (B,), one for each example, got {got!r}.")
        return self._set("seeds", [seeds * _LAYER_STRIDE + place for place in range(len(self._states))])

    def _set(self, name: str, values: Sequence[object]) -> _Restore:
        """Sets an attribute of each layer's state, and has it set back."""
        states = self._states
        before = [getattr(state, name) for state in states]

        def assign(to: Sequence[object]) -> None:
            for state, value in zip(states, to, strict=True):
                setattr(state, name, value)

        assign(values)
        return _Restore(lambda: assign(before))

    def learned_tau_parameters(self) -> list[nn.Parameter]:
        """The learned temperatures (their logarithms), to be kept out of weight decay."""
        return [state.log_tau for state in self._states if state.log_tau is not None]

    def remove(self) -> None:
        """Takes the patch out: every module is as it was.

        Raises:
            RuntimeError: it has been taken out before, or the model was patched again since.
        """
        self._check_in_force()
        newest = max(state.patch_number for state in _states_in(self._model))
        own = max(state.patch_number for state in self._states)
        if newest > own:
            raise RuntimeError(
                f"this is patch {own} of the model and there is a patch {newest}: remove them in reverse order, the "
                "latest first."
            )
        for layer, _, state in reversed(self._patched):
            state.leave(self._model.get_submodule(layer.name))
            stop_following(self._model.get_submodule(layer.name.rpartition(".")[0]), state)
        refresh_views(self._model)
        self._patched = []

    def _check_in_force(self) -> None:
        if not self._patched or any(
            state_of(self._model.get_submodule(layer.name)) is not state for layer, _, state in self._patched
        ):
            raise RuntimeError(
                "this patch has been removed, or PEFT has put copies in its place: patch the model again with "
                "patch_model(model, config), or take the handle that gumbel_attention.patch_of(model) gives."
            )

    def __enter__(self) -> ModelPatch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._patched:
            self.remove()

    def __repr__(self) -> str:
        lines = [f"{layer} {{{state.extra_repr()}}}" for layer, _, state in self._patched]
        return "\n".join([f"ModelPatch of {len(lines)} attention layers:", *(f"  {line}" for line in lines)])


def patched_modules(model: nn.Module) -> list[PatchedModule]:
    """The patched layers of a model, in its order."""
    found = []
    for name, module in model.named_modules():
        state = state_of(module)
        if state is not None:
            found.append(
                PatchedModule(PatchedLayer(name, type(module).__name__, state.way, notes(type(module))), module, state)
            )
    return found


def _states_in(model: nn.Module) -> list[PatchedState]:
    return [module for module in model.modules() if isinstance(module, PatchedState)]


class _Restore:
    """Runs a function at the end of a ``with`` block."""

    def __init__(self, restore: Callable[[], None]) -> None:
        self._restore = restore

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        self._restore()
