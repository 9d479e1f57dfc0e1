"""Native CPU kernels in float32: what attention of PyTorch costs, with the noise drawn in the kernel.

The formulas of the reference in blocks of queries and keys that stay in the cache. Nothing of the size of the scores
is kept: the backward pass computes scores and noise again. bfloat16 and float16 come and go as they are, computed from
copies in float32. Compiled on first use; see :func:`available`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..problem import AttentionProblem, compute_dtype
from . import ops

__all__ = ["attention", "available", "unsupported"]


def available() -> str | None:
    """Why the kernels cannot be used on this machine; ``None`` if they can. Compiles them at the first call."""
    if torch.compiler.is_compiling():
        from . import build_constants

        return build_constants.unavailable()  # type: ignore[no-any-return]  # torch leaves its decorator without types
    return ops.unavailable()


def unsupported(problem: AttentionProblem) -> str | None:
    """Why the kernels cannot solve ``problem``; ``None`` if they can."""
    choice, query = problem.choice, problem.query
    if query.device.type != "cpu":
        return f"it computes on the CPU, and the tensors are on {query.device}"
    if compute_dtype(query.dtype) != torch.float32:
        return f"it computes in float32, and the tensors are {query.dtype}"
    if choice.noise not in ("none", "gumbel"):
        return f"it draws Gumbel noise only, not {choice.noise!r}"
    if not choice.only_straight_through:
        return "its hard choice is of one key, straight-through"
    if problem.softcap is not None:
        return "it has no softcap"
    if problem.sinks is not None:
        return "it has no sinks"
    offsets = (problem.q_offset, problem.k_offset)
    if any(isinstance(x, Tensor) for x in offsets):
        return "its q_offset and k_offset are ints, not tensors"
    if problem.bias is not None and problem.bias.requires_grad and torch.is_grad_enabled():
        return "it gives no gradient to a float mask"
    return None


def attention(problem: AttentionProblem, block: int = 0) -> Tensor:
    """Attention's output, (B, H, Lq, Dv), differentiable once in query, key, value, tau and noise_scale.

    Args:
        problem: the checked arguments.
        block: how many queries a block holds: 16, 32, ... 128; 0 leaves it to the kernels.

    Raises:
        NotImplementedError: the kernels cannot solve this problem, or are not available.
    """
    reason = unsupported(problem) or available()
    if reason is not None:
        raise NotImplementedError(f"impl='cpu' is not possible here: {reason}. impl='blockwise' is.")
    tensors = {name: getattr(problem, name).to(torch.float32) for name in ("query", "key", "value")}
    return ops.attention(dataclasses.replace(problem, **tensors), block).to(problem.query.dtype)
