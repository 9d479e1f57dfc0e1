"""Fused kernels for NVIDIA GPUs: memory linear in the sequence, noise made where it is used.

Importing this package does not import triton; ``attention`` does. Under ``TRITON_INTERPRET=1`` the kernels run on
any device, slowly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem import AttentionProblem
from . import device, ops

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention(problem: AttentionProblem) -> Tensor:
    """Attention's output, (B, H, Lq, Dv), differentiable once in query, key, value, tau and noise_scale.

    Raises:
        ValueError: the kernels do not cover the problem; the message says what.
        RuntimeError: a kernel could not be compiled or started, or a second derivative or vmap was asked for.
    """
    reason = unsupported(problem)
    if reason is not None:
        raise ValueError(f"impl='triton' cannot compute this: {reason}.")
    return ops.attention(problem)


def available() -> str | None:
    """Why no kernel can run here; ``None`` where they can. Imports triton where there is a GPU for it."""
    return _device().unavailable()  # type: ignore[no-any-return]  # one of two modules with the same functions


def unsupported(problem: AttentionProblem) -> str | None:
    """Why the kernels do not cover a problem; ``None`` where they do."""
    query, choice, bias = problem.query, problem.choice, problem.bias
    d, d_v = query.shape[-1], problem.value.shape[-1]
    reasons = {
        "their hard choice is of one key, straight-through": not choice.only_straight_through,
        "they have no soft cap": problem.softcap is not None,
        "they have no sinks": problem.sinks is not None,
        "they give attn_mask no gradient": bias is not None and bias.requires_grad and torch.is_grad_enabled(),
        f"they have no {choice.noise} noise": choice.noise not in ("none", "gumbel"),
        "offsets must be ints": isinstance(problem.q_offset, Tensor) or isinstance(problem.k_offset, Tensor),
        f"head dimensions must be 1 to {MAX_HEAD_DIM}, got {d} and {d_v}": min(d, d_v) < 1
        or max(d, d_v) > MAX_HEAD_DIM,
        f"scale must be > 0, got {problem.scale}": not problem.scale > 0,
        f"the dtype must be float32, float16 or bfloat16, got {query.dtype}": query.dtype not in DTYPES,
        "tau and noise_scale must be one number or one for each head": any(
            isinstance(x, Tensor) and x.numel() not in (1, query.shape[1]) for x in (choice.tau, choice.noise_scale)
        ),
    }
    missing = next((reason for reason, holds in reasons.items() if holds), None)
    return missing or _device().unavailable() or _device().wrong_device(query.device)


def _device() -> Any:
    """The module that knows the device; for a compiler one that gives its answers as constants."""
    if torch.compiler.is_compiling():
        from . import device_constants

        return device_constants
    return device
