"""The settings of one Gumbel attention layer, or of a group of them."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

NOISE_VERSION = 1
"""Version of the noise specification; written into saved configurations."""

NOISES = ("none", "gumbel", "normal")
ESTIMATORS = ("straight_through",)
IMPLS = ("auto", "sdpa", "triton", "cpu", "blockwise", "reference")
LEARN_TAU = (None, "scalar", "head")


def choose(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``, naming the nearest allowed one."""
    if any(value is option or (isinstance(value, str) and value == option) for option in allowed):
        return
    near = difflib.get_close_matches(str(value), [str(option) for option in allowed], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.{hint}")


def check_positive(name: str, value: object, *, zero_allowed: bool = False) -> None:
    """Raises unless ``value`` is a finite Python number above zero (or zero, where that is allowed)."""
    wanted = f"a finite number {'>= 0' if zero_allowed else '> 0'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}.")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")


def check_choice(hard: bool, noise: str, estimator: str | None) -> None:
    """Checks the settings that say how a distribution becomes attention weights.

    Raises:
        TypeError: ``hard`` is not a bool.
        ValueError: an unknown noise or estimator, or an estimator for a soft choice.
    """
    if not isinstance(hard, bool):
        raise TypeError(f"hard must be True or False, got {hard!r}.")
    choose("noise", noise, NOISES)
    choose("estimator", estimator, (None, *ESTIMATORS))
    if estimator is not None and not hard:
        raise ValueError(
            f"estimator={estimator!r} says how a gradient passes a hard choice and needs hard=True, got hard=False."
        )


@dataclasses.dataclass(frozen=True)
class GumbelAttentionConfig:
    """What attention does in place of its softmax. Checked when made, immutable after.

    The layer computes ``Z = (scores + noise_scale * G) / tau`` and then ``softmax(Z)``, or with ``hard``
    the one-hot choice ``argmax(Z)`` whose gradient is passed by ``estimator``.

    Args:
        tau: the initial temperature, > 0; it divides scores and noise alike. The current one is state of
            the layer, not of this object.
        hard: the forward pass picks one key; ``False`` is the relaxation.
        noise: ``"gumbel"``, ``"normal"`` (same variance, pi^2 / 6) or ``"none"``.
        noise_scale: multiplies the noise, not the scores; 1.0 samples Categorical(softmax(scores)) exactly.
        estimator: how the gradient passes a hard choice; ``None`` is ``"straight_through"`` when ``hard``.
        eval_noise: keep the noise in ``eval()`` mode.
        eval_hard: whether the choice is hard in ``eval()`` mode; ``None`` is as in training.
        learn_tau: ``None``, ``"scalar"`` (one learned temperature per layer) or ``"head"`` (one per head).
        layers: which attention layers of a model: indices (negative ones count from the end), slices of them as
            strings (``"2:"``, ``":-1"``), patterns of module names, or ``"encoder"``, ``"decoder"``, ``"cross"``;
            ``None`` is all.
        heads: which heads of these layers; the others keep their plain softmax. ``None`` is all.
        impl: which implementation computes it; ``"auto"`` chooses.

    Raises:
        TypeError, ValueError: a setting is outside its range; the message says what was expected.
    """

    tau: float = 1.0
    hard: bool = False
    noise: str = "gumbel"
    noise_scale: float = 1.0
    estimator: str | None = None
    eval_noise: bool = False
    eval_hard: bool | None = None
    learn_tau: str | None = None
    layers: tuple[int | str, ...] | None = None
    heads: tuple[int, ...] | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        check_positive("tau", self.tau)
        check_positive("noise_scale", self.noise_scale, zero_allowed=True)
        if self.eval_hard not in (None, True, False):
            raise TypeError(f"eval_hard must be None, True or False, got {self.eval_hard!r}.")
        check_choice(self.hard or bool(self.eval_hard), self.noise, self.estimator)
        if not isinstance(self.hard, bool) or not isinstance(self.eval_noise, bool):
            raise TypeError(f"hard and eval_noise must be bool, got {self.hard!r} and {self.eval_noise!r}.")
        choose("learn_tau", self.learn_tau, LEARN_TAU)
        choose("impl", self.impl, IMPLS)
        object.__setattr__(self, "layers", _selection("layers", self.layers, (int, str)))
        object.__setattr__(self, "heads", _selection("heads", self.heads, (int,)))

    def to_dict(self) -> dict[str, Any]:
        """All settings and the noise version, as plain values that JSON and YAML can hold."""
        plain = dataclasses.asdict(self)
        for name in ("layers", "heads"):
            plain[name] = None if plain[name] is None else list(plain[name])
        return {**plain, "noise_version": NOISE_VERSION}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> GumbelAttentionConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown keys, or another noise version than this library draws.
        """
        rest = dict(settings)
        version = rest.pop("noise_version", NOISE_VERSION)
        if version != NOISE_VERSION:
            raise ValueError(
                f"the configuration was written for noise_version {version!r}, this library draws version "
                f"{NOISE_VERSION}: results would not repeat. Use the library version that wrote it."
            )
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(rest) - set(known))
        if unknown:
            raise ValueError(f"unknown settings {unknown}; known are {known}.")
        return cls(**rest)


def _selection(name: str, value: Any, kinds: tuple[type, ...]) -> tuple[Any, ...] | None:
    """``value`` as a tuple of the given kinds; a single element counts as a selection of one."""
    if value is None:
        return None
    items = (value,) if isinstance(value, (int, str)) else tuple(value)
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if not items:
        raise ValueError(f"{name} must be None (all of them) or name at least one, got an empty selection.")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, kinds):
            raise TypeError(f"{name} must hold {wanted}, got {item!r} of type {type(item).__name__}.")
    return items
