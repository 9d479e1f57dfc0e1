"""The attentions that a benchmark compares."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import gumbel_attention as ga

SDPA, FLASH, CUDNN = "sdpa", "sdpa-flash", "sdpa-cudnn"
X_TRANSFORMERS = "x-transformers"
ARMS: dict[str, dict[str, Any]] = {
    "softmax": {"noise": "none"},
    "gumbel-soft": {"noise": "gumbel"},
    "gumbel-st": {"noise": "gumbel", "hard": True},
    "det-st": {"noise": "none", "hard": True},
}
Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


@dataclasses.dataclass(frozen=True)
class Contender:
    """An attention (q, k, v, causal) -> output, all (B, H, N, D).

    Attributes:
        name: its row in the table.
        attention: computes it.
        numbers_per_score: how many numbers of the inputs' dtype forward + backward keep for each of the N x N scores
            of a head, measured and rounded up; 0 where memory is linear in N.
        ours: implementation and arm of this library.
    """

    name: str
    attention: Attention
    numbers_per_score: int = 0
    ours: tuple[str, str] | None = None

    def bytes_needed(self, heads: int, length: int, dtype: torch.dtype) -> int:
        """About what forward + backward keep at most."""
        return self.numbers_per_score * heads * length * length * dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Field:
    """The contenders that can run, and by name those that cannot, with the reason."""

    contenders: list[Contender]
    absent: dict[str, str]

    @property
    def baseline(self) -> str:
        """What ratios are taken to: torch's flash attention where it runs, else what torch chooses."""
        return FLASH if any(contender.name == FLASH for contender in self.contenders) else SDPA


def find_contenders(device: torch.device, dtype: torch.dtype) -> Field:
    """Torch's own attentions, those that people write, and every implementation of ours that can run here.

    "x-transformers" is the core of that package's ``Attention(gumbel_softmax=True)``, without its projections:
    ``x_transformers.attend.Attend``, which takes queries, keys and values. It keeps all scores, applies
    ``F.gumbel_softmax`` with its defaults there, temperature 1 and ``hard=True`` (straight-through), draws noise in
    ``eval()`` too, and returns the scores beside the output. "sdpa-flash" and "sdpa-cudnn" enter and leave torch's
    choice of a backend at each call, some microseconds that count at short lengths only.
    """
    found, absent = [], {}
    for candidate in _others(device):
        reason = _why_not(candidate.attention, device, dtype)
        if reason is None:
            found.append(candidate)
        else:
            absent[candidate.name] = reason
    for impl in ga.dispatch.IMPLEMENTATIONS:
        arms = _our_arms(impl)
        reasons = [_why_not(arm.attention, device, dtype) for arm in arms]
        found += [arm for arm, reason in zip(arms, reasons, strict=True) if reason is None]
        if None not in reasons:
            absent[impl] = str(reasons[0])
    return Field(found, absent)


def contender_named(name: str, device: torch.device) -> Contender:
    """One contender, whether or not it can run.

    Raises:
        StopIteration: there is none of this name.
    """
    every = (*_others(device), *(arm for impl in ga.dispatch.IMPLEMENTATIONS for arm in _our_arms(impl)))
    return next(contender for contender in every if contender.name == name)


def ours(impl: str, settings: dict[str, Any]) -> Attention:
    """Attention of this library."""

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return ga.gumbel_attention(q, k, v, is_causal=causal, tau=1.0, impl=impl, **settings)

    return attention


def eager(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Softmax attention with all scores in memory."""
    return _scores(q, k, causal).softmax(-1) @ v


def textbook(q: Tensor, k: Tensor, v: Tensor, causal: bool, hard: bool) -> Tensor:
    """Gumbel attention as it is usually written."""
    return F.gumbel_softmax(_scores(q, k, causal), tau=1.0, hard=hard, dim=-1) @ v


def x_transformers_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The core of x-transformers' ``Attention(gumbel_softmax=True)``; see :func:`find_contenders`.

    Raises:
        ModuleNotFoundError: the package, or one that it needs, is not installed.
    """
    output: Tensor = _x_transformers_core(causal)(q, k, v)[0]
    return output


@functools.cache
def _x_transformers_core(causal: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package's import
        return importlib.import_module("x_transformers.attend").Attend(gumbel_softmax=True, causal=causal)


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if not causal:
        return scores
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -math.inf)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: SDPBackend | None = None) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _others(device: torch.device) -> list[Contender]:
    flash = functools.partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION)
    cudnn = functools.partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION)
    return [
        Contender(SDPA, _sdpa),
        *([Contender(FLASH, flash), Contender(CUDNN, cudnn)] if device.type == "cuda" else []),
        Contender("eager softmax", eager, 6),
        Contender("F.gumbel_softmax soft", functools.partial(textbook, hard=False), 8),
        Contender("F.gumbel_softmax hard", functools.partial(textbook, hard=True), 14),
        Contender(X_TRANSFORMERS, x_transformers_attention, 11),
    ]


def _our_arms(impl: str) -> list[Contender]:
    kept = 24 if impl == "reference" else 0
    return [Contender(f"{impl} {arm}", ours(impl, settings), kept, (impl, arm)) for arm, settings in ARMS.items()]


def _why_not(attention: Attention, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here at all, in its own words; ``None`` if it can."""
    x = torch.zeros(1, 1, 32, 64, device=device, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every attention that it does not take
            attention(x, x, x, False)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except (RuntimeError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    return None
