"""What an attention layer carries beside its weights: its settings, its current temperature, its noise switch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import ESTIMATORS, NOISES, GumbelAttentionConfig, check_positive, check_tau, choose
from .impl.problem import AttentionProblem

SMALLEST_TAU = 1e-4
"""Temperature of the expectation of a choice whose noise scale is lower, 0 included."""


class AttentionState(nn.Module):
    """Settings, temperature and noise scale of one layer, a submodule of it.

    A scheduled temperature and the noise scale are buffers outside the state_dict. A learned temperature is the
    parameter ``log_tau`` of shape (1,) or (num_heads,), so that tau = exp(log_tau) is positive by construction. They
    stay float32 whatever dtype the model is cast to.

    Args:
        config: the settings.
        num_heads: query heads of the layer.
        device: where the temperature is kept.

    Attributes:
        noise_override: what :meth:`GumbelMultiheadAttention.noise` and the like set; ``None`` leaves it to the mode.
        hard_override: whether the choice is hard in both modes; ``None`` leaves it to the mode.
        seeds: int64 (B,), a seed for each example of the next calls; ``None`` draws one for each call.
        collector: who gets the log-probabilities (B, H, q_len) of the hard choices.
        expected: a choice is its expectation, softmax(scores / noise_scale).
        observers: who is told of each call, with the seed that it uses.

    Raises:
        ValueError: ``config.heads`` names a head the layer does not have.
    """

    def __init__(
        self, config: GumbelAttentionConfig, num_heads: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        outside = [head for head in config.heads or () if not -num_heads <= head < num_heads]
        if outside:
            raise ValueError(f"heads {outside} match nothing: the layer has {num_heads} heads, 0 to {num_heads - 1}.")
        self.config = config
        self.num_heads = num_heads
        self.noise_override: bool | str | None = None
        self.hard_override: bool | None = None
        self.seeds: Tensor | None = None
        self.collector: Callable[[Tensor], None] | None = None
        self.expected = False
        self.observers: tuple[Callable[[AttentionProblem], None], ...] = ()
        self._noise_scale: Tensor
        self._tau: Tensor
        self.log_tau: nn.Parameter | None
        with torch.inference_mode(False):  # a tensor made in that mode could never be set or learned outside it
            self.register_buffer("_noise_scale", _number(config.noise_scale, device), persistent=False)
            if config.learn_tau is None:
                self.register_parameter("log_tau", None)
                self.register_buffer("_tau", _number(config.tau, device), persistent=False)
            else:
                size = num_heads if config.learn_tau == "head" else 1
                start = torch.full((size,), math.log(config.tau), dtype=torch.float32, device=device)
                self.log_tau = nn.Parameter(start)

    @contextmanager
    def observed(self, observer: Callable[[AttentionProblem], None]) -> Iterator[None]:
        """Within this context ``observer`` is told of each call; contexts may end in any order."""
        self.observers = (*self.observers, observer)
        try:
            yield
        finally:
            self.observers = tuple(other for other in self.observers if other is not observer)

    @property
    def tau(self) -> Tensor:
        """The current temperature: float32 of shape (), or (1,) or (num_heads,) where it is learned."""
        return self._tau if self.log_tau is None else self.log_tau.exp()

    def check_tau(self, tau: float) -> None:
        """Raises what :meth:`set_tau` would, and changes nothing."""
        check_tau(tau, self.config.estimator)
        if self.log_tau is not None:
            raise RuntimeError("this layer learns its temperature (learn_tau); it cannot be set by a schedule.")

    def set_tau(self, tau: float) -> None:
        """Sets the scheduled temperature, in place: a step's forward and backward pass must see the same one.

        Raises:
            TypeError, ValueError: ``tau`` is not a finite number > 0.
            RuntimeError: the temperature of this layer is learned.
        """
        self.check_tau(tau)
        self._tau.fill_(tau)

    @property
    def noise_scale(self) -> Tensor:
        """What multiplies the noise: float32 of shape ()."""
        return self._noise_scale

    def set_noise_scale(self, noise_scale: float) -> None:
        """Sets what multiplies the noise, in place.

        Raises:
            TypeError, ValueError: ``noise_scale`` is not a finite number >= 0.
            RuntimeError: the layer's settings say 0: no noise is drawn then.
        """
        self.check_noise_scale(noise_scale)
        self._noise_scale.fill_(noise_scale)

    def check_noise_scale(self, noise_scale: float) -> None:
        """Raises what :meth:`set_noise_scale` would, and changes nothing."""
        check_positive("noise_scale", noise_scale, zero_allowed=True)
        if self.config.noise_scale == 0.0 and noise_scale != 0.0:
            raise RuntimeError("the layer's settings have noise_scale=0, without noise; make them with one above 0.")

    def check_override(self, on: bool | str | None) -> None:
        """Raises TypeError or ValueError unless ``on`` is a noise switch that this layer can follow."""
        if isinstance(on, str):
            choose("noise", on, NOISES)
        elif on is not None and not isinstance(on, bool):
            raise TypeError(f"noise must be True, False, a noise family, or None for the mode's own, got {on!r}.")
        elif on and self.config.noise == "none":
            raise ValueError("the layer has noise='none': name the family to switch on, such as 'gumbel'.")

    def check_hard(self, on: bool | None) -> None:
        """Raises TypeError unless ``on`` is a switch of the hard choice."""
        if on is not None and not isinstance(on, bool):
            raise TypeError(f"hard must be True, False or None for the mode's own, got {on!r}.")

    def noise(self, training: bool) -> str:
        """The noise family in force: the override if there is one, else the settings' in the given mode."""
        if isinstance(self.noise_override, str):
            return self.noise_override
        on = (training or self.config.eval_noise) if self.noise_override is None else bool(self.noise_override)
        return self.config.noise if on else "none"

    def hard(self, training: bool) -> bool:
        """Whether the choice is hard: the override if there is one, else the settings' in the given mode."""
        if self.hard_override is not None:
            return self.hard_override
        eval_hard = self.config.eval_hard
        return self.config.hard if training or eval_hard is None else eval_hard

    def arguments(self, training: bool) -> dict[str, Any]:
        """Keyword arguments for :func:`gumbel_attention` in the given mode."""
        seed = {} if self.seeds is None else {"seed": self.seeds}
        if self.expected:
            return seed | {
                "tau": self._noise_scale.clamp(min=SMALLEST_TAU),
                "hard": False,
                "noise": "none",
                "impl": self.config.impl,
            }
        hard, noise = self.hard(training), self.noise(training)
        estimator = self.estimator(hard, noise)
        return seed | {
            "tau": self.tau,
            "hard": hard,
            "noise": noise,
            "noise_scale": self._noise_scale if self.config.noise_scale > 0.0 else 0.0,
            "estimator": estimator,
            "samples": self.config.samples if estimator == "gumbel_rao" else None,
            "top_k": self.config.top_k,
            "impl": self.config.impl,
        }

    def draws_by_seeds(self, training: bool, dropout_p: float) -> bool:
        """Whether a call draws its noise, or dropout of rate ``dropout_p``, by the seeds of its examples."""
        if self.seeds is None:
            return False
        noisy = not self.expected and self.noise(training) != "none" and self.config.noise_scale > 0.0
        return noisy or dropout_p > 0.0

    def estimator(self, hard: bool, noise: str) -> str | None:
        """The estimator of a choice: the settings' where it is defined for it, else ``None``, straight-through."""
        name = self.config.estimator
        if not hard or name is None:
            return None
        sampled = noise == "gumbel" and self.config.noise_scale > 0.0
        return name if sampled or not ESTIMATORS[name].gumbel else None

    def collects(self, settings: dict[str, Any]) -> bool:
        """Whether a call with these :meth:`arguments` has log-probabilities that somebody wants.

        The score function computes them always: checkpointing must find the same tensors when it computes again.
        """
        sampled = settings["hard"] and settings["noise"] == "gumbel" and self.config.noise_scale > 0.0
        sampled = sampled and settings["estimator"] != "noisy_gradient"
        return bool(sampled and (self.collector is not None or settings["estimator"] == "score_function"))

    def hand_over(self, log_prob: Tensor | None) -> None:
        """Gives the log-probabilities of a hard choice, (B, H, q_len), to the collector."""
        if self.collector is not None and log_prob is not None:
            self.collector(log_prob)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttentionState:
        """Moves the temperature with the model, but keeps it float32: bfloat16 would round it by up to 0.4 %."""

        def keep_dtype(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        was_meta = self.tau.is_meta
        super()._apply(keep_dtype, recurse)
        if was_meta and not self.tau.is_meta:
            self.reset_parameters()
        return self

    def reset_parameters(self) -> None:
        """Sets temperature and noise scale back to the initial ones, as meta tensors that get memory need."""
        with torch.no_grad():
            self._noise_scale.fill_(self.config.noise_scale)
            if self.log_tau is None:
                self._tau.fill_(self.config.tau)
            else:
                self.log_tau.fill_(math.log(self.config.tau))

    def extra_repr(self) -> str:
        """The settings that differ from the defaults."""
        default = GumbelAttentionConfig().to_dict()
        return ", ".join(
            f"{name}={value!r}" for name, value in self.config.to_dict().items() if value != default[name]
        )


def _number(value: float, device: torch.device | str | None) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)
