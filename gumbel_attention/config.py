"""The settings of one Gumbel attention layer, or of a group of them."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NOISE_VERSION = 1
"""Version of the noise specification; written into saved configurations."""

NOISES = ("none", "gumbel", "normal", "logistic")
IMPLS = ("auto", "sdpa", "triton", "cpu", "blockwise", "reference")
LEARN_TAU = (None, "scalar", "head")
DEFAULT_SAMPLES = 10
"""Samples of ``"gumbel_rao"`` where none are asked for."""


class Range(NamedTuple):
    """What an estimator is defined for.

    Attributes:
        gumbel: the choice must be a sample of softmax(scores / noise_scale), which only Gumbel noise gives.
        subsets: it passes the choice of several keys.
        tau_gradient: the gradient of tau is defined.
        smallest_tau: the lowest temperature its authors allow.
    """

    gumbel: bool
    subsets: bool
    tau_gradient: bool
    smallest_tau: float = 0.0


ESTIMATORS = {
    "straight_through": Range(gumbel=False, subsets=True, tau_gradient=True),
    "gumbel_rao": Range(gumbel=True, subsets=False, tau_gradient=True),
    "reinmax": Range(gumbel=True, subsets=False, tau_gradient=False, smallest_tau=1.0),
    "score_function": Range(gumbel=True, subsets=True, tau_gradient=False),
    "noisy_gradient": Range(gumbel=False, subsets=True, tau_gradient=True),
}


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


def check_count(name: str, value: object) -> None:
    """Raises unless ``value`` is ``None`` or an integer >= 1."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be None or an integer >= 1, got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{name} must be None or an integer >= 1, got {value!r}.")


def check_choice(
    hard: bool, noise: str, estimator: str | None, samples: int | None = None, top_k: int | None = None
) -> None:
    """Checks the settings that say how a distribution becomes attention weights.

    Raises:
        TypeError: ``hard`` is not a bool, or a count not an integer.
        ValueError: an unknown noise or estimator, a count below 1, or an estimator for what it is not defined for.
    """
    if not isinstance(hard, bool):
        raise TypeError(f"hard must be True or False, got {hard!r}.")
    choose("noise", noise, NOISES)
    choose("estimator", estimator, (None, *ESTIMATORS))
    check_count("samples", samples)
    check_count("top_k", top_k)
    if samples is not None and estimator != "gumbel_rao":
        raise ValueError(f"samples={samples} is for estimator='gumbel_rao', got estimator={estimator!r}.")
    if estimator is None:
        return
    if not hard:
        raise ValueError(
            f"estimator={estimator!r} says how a gradient passes a hard choice and needs hard=True, got hard=False."
        )
    if ESTIMATORS[estimator].gumbel and noise != "gumbel":
        raise ValueError(
            f"estimator={estimator!r} needs a choice that is a sample of softmax(scores), which only noise='gumbel' "
            f"gives, got noise={noise!r}."
        )
    if top_k is not None and not ESTIMATORS[estimator].subsets:
        able = [name for name, range_ in ESTIMATORS.items() if range_.subsets]
        raise ValueError(f"estimator={estimator!r} passes the choice of one key, got top_k={top_k}. {able} pass more.")


def check_tau(tau: object, estimator: str | None) -> None:
    """Raises unless ``tau`` is a finite number > 0, and not below what ``estimator`` is defined for."""
    check_positive("tau", tau)
    smallest = 0.0 if estimator is None else ESTIMATORS[estimator].smallest_tau
    if isinstance(tau, (int, float)) and tau < smallest:
        raise ValueError(f"estimator={estimator!r} is defined for tau >= {smallest}, got tau={tau!r}.")


def check_noise_scale(noise_scale: object, estimator: str | None) -> None:
    """Raises unless ``noise_scale`` is a finite number >= 0, and not 0 where ``estimator`` needs noise."""
    if estimator is not None and ESTIMATORS[estimator].gumbel:
        check_positive(f"noise_scale of estimator={estimator!r}", noise_scale)
    else:
        check_positive("noise_scale", noise_scale, zero_allowed=True)


@dataclasses.dataclass(frozen=True)
class GumbelAttentionConfig:
    """What attention does in place of its softmax. Checked when made, immutable after.

    The layer computes ``Z = (scores + noise_scale * G) / tau`` and then ``softmax(Z)``, or with ``hard``
    the one-hot choice ``argmax(Z)`` whose gradient is passed by ``estimator``.

    Args:
        tau: the initial temperature, > 0; it divides scores and noise alike. The current one is state of
            the layer, not of this object.
        hard: the forward pass picks one key; ``False`` is the relaxation.
        noise: ``"gumbel"``, ``"normal"`` or ``"logistic"`` (of the same variance, pi^2 / 6), or ``"none"``.
        noise_scale: multiplies the noise, not the scores; 1.0 samples Categorical(softmax(scores)) exactly.
        estimator: how the gradient passes a hard choice: ``"straight_through"``, ``"gumbel_rao"``, ``"reinmax"``,
            ``"score_function"`` or ``"noisy_gradient"``; see :mod:`gumbel_attention.estimators`. ``None`` is
            ``"straight_through"`` when ``hard``. ``"noisy_gradient"`` takes the key of the largest score and has the
            noise in the gradient only. ``"gumbel_rao"``, ``"reinmax"`` and ``"score_function"`` are about a sampled
            choice: where the noise is off, or of another family, the choice is deterministic or no such sample, and
            straight-through passes it.
        samples: K of ``"gumbel_rao"``; ``None`` is 10.
        top_k: attend to this many keys, chosen without replacement, with equal weights; soft: the relaxation of that.
            ``None`` is the choice of one.
        eval_noise: keep the noise in ``eval()`` mode.
        eval_hard: whether the choice is hard in ``eval()`` mode; ``None`` is as in training.
        learn_tau: ``None``, ``"scalar"`` (one learned temperature per layer) or ``"head"`` (one per head).
        layers: which attention layers of a model: indices (negative ones count from the end), slices of them as
            strings (``"2:"``, ``":-1"``), patterns of module names, or ``"encoder"``, ``"decoder"``, ``"cross"``;
            ``None`` is all.
        heads: which heads of these layers; the others keep their plain softmax. ``None`` is all.
        impl: which implementation computes it: ``"sdpa"``, ``"triton"``, ``"cpu"``, ``"blockwise"`` or
            ``"reference"``; ``"auto"`` chooses.

    Raises:
        TypeError, ValueError: a setting is outside its range; the message says what was expected.
    """

    tau: float = 1.0
    hard: bool = False
    noise: str = "gumbel"
    noise_scale: float = 1.0
    estimator: str | None = None
    samples: int | None = None
    top_k: int | None = None
    eval_noise: bool = False
    eval_hard: bool | None = None
    learn_tau: str | None = None
    layers: tuple[int | str, ...] | None = None
    heads: tuple[int, ...] | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        if self.eval_hard is not None and not isinstance(self.eval_hard, bool):
            raise TypeError(f"eval_hard must be None, True or False, got {self.eval_hard!r}.")
        check_choice(self.hard or bool(self.eval_hard), self.noise, self.estimator, self.samples, self.top_k)
        check_tau(self.tau, self.estimator)
        check_noise_scale(self.noise_scale, self.estimator)
        if not isinstance(self.hard, bool) or not isinstance(self.eval_noise, bool):
            raise TypeError(f"hard and eval_noise must be bool, got {self.hard!r} and {self.eval_noise!r}.")
        choose("learn_tau", self.learn_tau, LEARN_TAU)
        if self.learn_tau is not None and self.estimator is not None and not ESTIMATORS[self.estimator].tau_gradient:
            raise ValueError(
                f"learn_tau={self.learn_tau!r} needs a gradient of tau, and estimator={self.estimator!r} has none."
            )
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
