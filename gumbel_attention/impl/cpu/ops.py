"""The kernels as torch operators: their shapes for tracing, and their gradients."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor

from ..problem import AttentionProblem
from . import build

INPUTS = 18
"""Arguments of cpu_forward."""
_LOCK = threading.Lock()


def unavailable() -> str | None:
    """Why the operators cannot be used on this machine; ``None`` if they can. Compiles them at the first call."""
    with _LOCK:  # a cached function that is still running is run once more by another thread
        reason = build.load()
        if reason is None:
            register()
    return reason


def attention(problem: AttentionProblem, block: int) -> Tensor:
    """The output of a problem that the kernels support."""
    choice, where = problem.choice, problem.choice.where
    bias, keep = problem.bias, problem.keep
    if bias is not None and bias.dtype == torch.float32:
        keep = None  # the kernel sees in the bias itself which entries take part
    elif bias is not None:
        bias = bias.to(torch.float32)
    output: Tensor = torch.ops.gumbel_attention.cpu_forward(
        problem.query,
        problem.key,
        problem.value,
        _parameter(choice.tau),
        _parameter(choice.noise_scale),
        torch.zeros((), dtype=torch.int64) if where is None else where.seed,
        keep,
        None if bias is None else bias.detach(),
        problem.scale,
        problem.is_causal,
        problem.q_offset,
        problem.k_offset,
        choice.hard,
        choice.noise != "none",
        problem.dropout_p,
        0 if where is None else where.h_offset,
        problem.query.shape[1] if where is None else where.h_total or where.heads,
        block,
    )[0]
    return output


def _parameter(x: float | Tensor) -> Tensor:
    """tau or noise_scale as the kernels take it: float32, one number or one for each head."""
    return x.to(torch.float32).reshape(-1) if isinstance(x, Tensor) else torch.full((1,), x, dtype=torch.float32)


@functools.cache
def register() -> None:
    """Registers what the C++ side leaves to Python; the library must be loaded."""
    torch.library.register_fake("gumbel_attention::cpu_forward", _forward_shapes)
    torch.library.register_fake("gumbel_attention::cpu_backward", _backward_shapes)
    torch.library.register_autograd("gumbel_attention::cpu_forward", _backward, setup_context=_setup)
    torch.library.register_autograd("gumbel_attention::cpu_backward", _second_derivative)
    for name in ("cpu_forward", "cpu_backward"):
        torch.library.register_vmap(f"gumbel_attention::{name}", _no_vmap)


def _forward_shapes(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    hard = rest[9]
    rows = query.shape[:-1]
    heads = rows[:-1]
    return (
        query.new_empty(*rows, value.shape[-1]),
        query.new_empty(rows),
        query.new_empty(*heads, 0 if hard else rows[-1]),
        query.new_empty(*heads, rows[-1] if hard else 0, dtype=torch.int64),
    )


def _backward_shapes(
    grad: Tensor, output: Tensor, top: Tensor, log_sum: Tensor, index: Tensor, parameters: bool, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in rest[:5])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.settings = inputs[8:]
    ctx.save_for_backward(*inputs[:8], *output)


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    *tensors, out, top, log_sum, index = ctx.saved_tensors
    parameters = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    gradients = torch.ops.gumbel_attention.cpu_backward(
        grad, out, top, log_sum, index, parameters, *tensors, *ctx.settings
    )
    wanted = [x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad[:5], strict=True)]
    return (*wanted, *(None,) * (INPUTS - len(wanted)))


def _second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "second derivatives are not implemented in impl='cpu': use impl='reference' with hard=False, or leave out "
        "create_graph=True."
    )


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> None:
    raise RuntimeError("vmap is not implemented in impl='cpu': put the examples into the batch dimension.")
