"""Fused kernels for NVIDIA GPUs: memory linear in the sequence, noise made where it is used.

Importing this package does not import triton; ``attention`` does. Under ``TRITON_INTERPRET=1`` the kernels run on
any device, slowly.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ..problem import AttentionProblem

MAX_HEAD_DIM = 256
WIDE_SHARED_MEMORY = 160 * 1024
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention(problem: AttentionProblem) -> Tensor:
    """Attention's output, (B, H, Lq, Dv), differentiable once in query, key, value, tau and noise_scale.

    Raises:
        ValueError: the kernels do not cover the problem; the message says what.
    """
    reason = unsupported(problem)
    if reason is not None:
        raise ValueError(f"impl='triton' cannot compute this: {reason}.")
    from . import launch

    return launch.attention(problem)


def available() -> str | None:
    """Why no kernel can run here; ``None`` where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _interpreting() and not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def unsupported(problem: AttentionProblem) -> str | None:
    """Why the kernels do not cover a problem; ``None`` where they do."""
    query, choice = problem.query, problem.choice
    d, d_v = query.shape[-1], problem.value.shape[-1]
    width = max(d, d_v)
    scale_numbers = (choice.tau, choice.noise_scale)
    reasons = {
        "they have no soft cap": problem.softcap is not None,
        "they have no sinks": problem.sinks is not None,
        "they give attn_mask no gradient": problem.bias is not None and problem.bias.requires_grad,
        f"they have no {choice.noise} noise": choice.noise not in ("none", "gumbel"),
        "offsets must be ints": not (isinstance(problem.q_offset, int) and isinstance(problem.k_offset, int)),
        f"head dimensions must be 1 to {MAX_HEAD_DIM}, got {d} and {d_v}": min(d, d_v) < 1 or width > MAX_HEAD_DIM,
        f"scale must be > 0, got {problem.scale}": not problem.scale > 0,
        f"the dtype must be float32, float16 or bfloat16, got {query.dtype}": query.dtype not in DTYPES,
        "tau and noise_scale must be one number or one for each head": any(
            isinstance(x, Tensor) and x.numel() not in (1, query.shape[1]) for x in scale_numbers
        ),
    }
    missing = next((reason for reason, holds in reasons.items() if holds), None)
    return missing or available() or _wrong_device(query.device, width)


def _wrong_device(device: torch.device, width: int) -> str | None:
    if _interpreting():
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the tensors must be on an NVIDIA GPU, got {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU must have compute capability 8.0 or more, got {capability[0]}.{capability[1]}"
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub leaves this property out
    shared = properties.shared_memory_per_block_optin
    if width > 64 and shared < WIDE_SHARED_MEMORY:
        return f"head dimensions above 64 need {WIDE_SHARED_MEMORY} bytes of shared memory, the GPU has {shared}"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
