"""The attentions that a benchmark compares, and the check that ours are right before they are timed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import gumbel_attention as ga

BASELINE = "sdpa"
ARMS: dict[str, dict[str, Any]] = {
    "softmax": {"noise": "none"},
    "gumbel-soft": {"noise": "gumbel"},
    "gumbel-st": {"noise": "gumbel", "hard": True},
    "det-st": {"noise": "none", "hard": True},
}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Contender:
    """An attention (B, H, N, D) -> (B, H, N, D), and whether it keeps all N x N scores."""

    name: str
    attention: Attention
    quadratic: bool


def contenders(device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """Torch's own attentions, those that people write, and every implementation of ours that can run here."""
    found = [Contender(BASELINE, F.scaled_dot_product_attention, False)]
    if device.type == "cuda":
        for name, backend in (("sdpa-flash", SDPBackend.FLASH_ATTENTION), ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION)):
            attention = _with_backend(backend)
            if _runs(attention, device, dtype):
                found.append(Contender(name, attention, False))
    found += [
        Contender("eager softmax", eager, True),
        Contender("F.gumbel_softmax soft", lambda q, k, v: textbook(q, k, v, hard=False), True),
        Contender("F.gumbel_softmax hard", lambda q, k, v: textbook(q, k, v, hard=True), True),
    ]
    for impl in (name for name in ga.dispatch.IMPLEMENTATIONS):
        for arm, settings in ARMS.items():
            attention = ours(impl, settings)
            if _runs(attention, device, dtype):
                found.append(Contender(f"{impl} {arm}", attention, impl == "reference"))
    return found


def ours(impl: str, settings: dict[str, Any]) -> Attention:
    """Attention of this library."""
    return lambda q, k, v: ga.gumbel_attention(q, k, v, tau=1.0, impl=impl, **settings)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with all scores in memory."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def textbook(q: Tensor, k: Tensor, v: Tensor, hard: bool) -> Tensor:
    """Gumbel attention as it is usually written."""
    return F.gumbel_softmax(q @ k.mT / math.sqrt(q.shape[-1]), tau=1.0, hard=hard, dim=-1) @ v


def disagreement(impl: str, settings: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What is wrong with an implementation of ours on these inputs; ``None`` if nothing is.

    Output and gradients against the reference in float64 on the same noise, over the queries whose choice agrees: the
    largest error may be twice that of the reference in the inputs' dtype, and one choice in a thousand may differ.
    """
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    results = []
    for tensors, name in ((exact, "reference"), (inputs, "reference"), (inputs, impl)):
        output = ga.gumbel_attention(*tensors, seed=1, impl=name, **settings)
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    if settings.get("hard"):
        flipped = ((results[2][0] - results[0][0]).abs().amax(-1) > 1e-2).double().mean().item()
        if flipped > 1e-3:
            return f"{flipped:.2%} of the choices differ"
        if flipped:
            return None  # one other choice changes the gradient of many keys
    for name, want, same, got in zip(("output", "dQ", "dK", "dV"), *results, strict=True):
        error, bound = ((x.double() - want).abs().max().item() for x in (got, same))
        if not error <= 2 * bound + 1e-5 * want.abs().max().item():
            return f"{name} is off by {error:.2e}, the reference in {q.dtype} by {bound:.2e}"
    return None


def _with_backend(backend: SDPBackend) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


def _runs(attention: Attention, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it runs at all here; what cannot says so by an error."""
    x = torch.zeros(1, 1, 32, 64, device=device, dtype=dtype)
    try:
        attention(x, x, x)
    except (RuntimeError, ValueError):
        return False
    return True
