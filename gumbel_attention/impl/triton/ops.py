"""The kernels as torch operators, opaque to compilers: their shapes for tracing, and their gradients.

Importing this module does not import triton; running an operator does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...choice import Choice
from ...noise import Coordinates
from ..problem import AttentionProblem
from .sizes import places

PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor tau, Tensor noise_scale, Tensor? seed, Tensor? keep, "
    "Tensor? bias, float scale, bool is_causal, SymInt q_offset, SymInt k_offset, bool hard, bool noisy, "
    "float dropout_p, SymInt h_offset, SymInt h_total"
)
TENSORS, DIFFERENTIABLE, INPUTS = 8, 5, 17
"""Of the arguments in ``PROBLEM``: tensors, those that may need a gradient, all."""
HARD, Q_OFFSET = 12, 10
"""Where in ``PROBLEM`` these are."""


def attention(problem: AttentionProblem) -> Tensor:
    """The output of a problem that the kernels support."""
    choice, where, query, bias = problem.choice, problem.choice.where, problem.query, problem.bias
    output: Tensor = torch.ops.gumbel_attention.triton_forward(
        query,
        problem.key,
        problem.value,
        _parameter(choice.tau, query),
        _parameter(choice.noise_scale, query),
        None if where is None else where.seed,
        problem.keep,
        None if bias is None else bias.detach(),
        problem.scale,
        problem.is_causal,
        problem.q_offset,
        problem.k_offset,
        choice.hard,
        choice.noise != "none",
        problem.dropout_p,
        0 if where is None else where.h_offset,
        query.shape[1] if where is None else where.h_total or where.heads,
    )[0]
    return output


def _parameter(x: float | Tensor, query: Tensor) -> Tensor:
    """tau or noise_scale as the kernels take it: float32, one number or one for each head; its value is not read."""
    if isinstance(x, Tensor):
        return x.to(query.device, torch.float32).reshape(-1)
    return torch.full((1,), x, dtype=torch.float32, device=query.device)


@torch.library.custom_op(
    "gumbel_attention::triton_forward", mutates_args=(), schema=f"({PROBLEM}) -> (Tensor output, Tensor rows)"
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The output, and of each row what the backward pass needs: log2 of the sum of exponents, or the chosen key."""
    from . import launch

    return launch.forward(_problem(*arguments))


@torch.library.custom_op(
    "gumbel_attention::triton_backward",
    mutates_args=(),
    schema=f"(Tensor d_output, Tensor? output, Tensor rows, bool[] wanted, {PROBLEM}) "
    "-> (Tensor d_query, Tensor d_key, Tensor d_value, Tensor d_tau, Tensor d_noise_scale)",
)
def _gradients(
    d_output: Tensor, output: Tensor | None, rows: Tensor, wanted: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    """The gradients that are ``wanted``; empty tensors in the place of the others."""
    from . import launch

    gradients = launch.backward(_problem(*arguments), output, rows, d_output, wanted)
    pairs = zip(arguments[:DIFFERENTIABLE], gradients, strict=True)
    return tuple(x.new_empty(0) if gradient is None else gradient for x, gradient in pairs)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tau: Tensor,
    noise_scale: Tensor,
    seed: Tensor | None,
    keep: Tensor | None,
    bias: Tensor | None,
    scale: float,
    is_causal: bool,
    q_offset: int,
    k_offset: int,
    hard: bool,
    noisy: bool,
    dropout_p: float,
    h_offset: int,
    h_total: int,
) -> AttentionProblem:
    """The problem of which ``attention`` made these arguments."""
    (batch, heads, q_len, _), k_len = query.shape, key.shape[-2]
    where = None
    if seed is not None:
        where = Coordinates(seed, batch, heads, q_len, k_len, q_offset, k_offset, h_offset, h_total)
    return AttentionProblem(
        query=query,
        key=key,
        value=value,
        keep=keep,
        bias=bias,
        is_causal=is_causal,
        q_offset=q_offset,
        k_offset=k_offset,
        scale=scale,
        softcap=None,
        sinks=None,
        dropout_p=dropout_p,
        seed_given=True,
        choice=Choice(tau, hard, "gumbel" if noisy else "none", noise_scale, where),
    )


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    hard, q_offset = rest[HARD - 3], rest[Q_OFFSET - 3]
    batch, heads, q_len, _ = query.shape
    dtype = torch.int32 if hard else torch.float32
    return (
        query.new_empty(batch, heads, q_len, value.shape[-1]),
        query.new_empty(batch, heads, places(q_len, q_offset), dtype=dtype),
    )


@_gradients.register_fake
def _(
    d_output: Tensor, output: Tensor | None, rows: Tensor, wanted: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    tensors = zip(arguments[:DIFFERENTIABLE], wanted, strict=True)
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in tensors)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[TENSORS:]
    ctx.save_for_backward(*inputs[:TENSORS], None if inputs[HARD] else output[0], output[1])


def _backward(ctx: Any, d_output: Tensor, d_rows: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, output, rows = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:DIFFERENTIABLE])
    gradients = torch.ops.gumbel_attention.triton_backward(d_output, output, rows, wanted, *tensors, *ctx.settings)
    given = [x if needed else None for x, needed in zip(gradients, wanted, strict=True)]
    return (*given, *(None,) * (INPUTS - DIFFERENTIABLE))


def _second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "second derivatives are not implemented in impl='triton': use impl='reference' with hard=False, or leave out "
        "create_graph=True."
    )


def _no_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise RuntimeError("vmap is not implemented in impl='triton': put the examples into the batch dimension.")


_forward.register_autograd(_backward, setup_context=_setup)
_gradients.register_autograd(_second_derivative)
_forward.register_vmap(_no_vmap)
_gradients.register_vmap(_no_vmap)
