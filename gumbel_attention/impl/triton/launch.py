"""From a problem to kernel launches: arguments, tile sizes, and the autograd function around them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import AttentionProblem
from .arithmetic import INTERPRET
from .columns import columns_kernel
from .forward import forward_kernel
from .rows import rows_kernel
from .tiles import ABSENT, PER_KEY, PER_SCORE

PLACES = 128
"""Rows' statistics are stored by place, in multiples of this, which is one of all tiles of queries."""

POSITION_BLOCK = 16
"""Tiles start at multiples of this position: groups of the noise do not straddle two."""


class Tile(NamedTuple):
    """Queries and keys of a tile, and how a program runs."""

    q: int
    k: int
    warps: int
    stages: int


def forward_tile(d: int, dtype: torch.dtype, hard: bool) -> Tile:
    """The tile of the forward kernel for head dims up to ``d``."""
    if INTERPRET:
        return Tile(32, 16, 4, 1)
    if dtype == torch.float32:
        return Tile(64, 32, 4, 2) if hard and d <= 128 else Tile(32, 32, 4, 2)
    if d <= 128:
        return Tile(128, 64, 8, 2 if d > 64 else 3)
    return Tile(128, 32, 8, 2)


def rows_tile(d: int, dtype: torch.dtype, hard: bool) -> Tile:
    """The tile of the row kernel."""
    if INTERPRET:
        return Tile(32, 16, 4, 1)
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    if d <= 64:
        return Tile(128, 64, 8, 2)
    if d <= 128:
        return Tile(128, 32, 8, 2) if hard else Tile(128, 64, 8, 2)
    return Tile(32, 32, 4, 1) if hard else Tile(128, 32, 8, 1)


def columns_tile(d: int, dtype: torch.dtype, hard: bool) -> Tile:
    """The tile of the column kernel; its queries divide those of the other two, whose rows it reads."""
    if INTERPRET:
        return Tile(16, 32, 4, 1)
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    if d <= 64:
        return Tile(64, 128, 8, 2)
    if d <= 128:
        return Tile(32, 128, 8, 2)
    return Tile(32, 128, 8, 1)


def attention(problem: AttentionProblem) -> Tensor:
    """Attention's output, (B, H, Lq, Dv), differentiable once in query, key, value, tau and noise_scale."""
    choice = problem.choice
    tau, noise_scale = (x if isinstance(x, Tensor) else None for x in (choice.tau, choice.noise_scale))
    output: Tensor = _Attention.apply(_detached(problem), problem.query, problem.key, problem.value, tau, noise_scale)
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: AttentionProblem, *tensors: Tensor | None) -> Tensor:
        output, lse, index = _forward(problem)
        ctx.problem = _with_tensors(problem, [None] * len(tensors))
        ctx.save_for_backward(*tensors, None if problem.choice.hard else output, lse, index)
        return output

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "second derivatives are not implemented in impl='triton': use impl='reference' with hard=False, or "
                "leave out create_graph=True."
            )
        *tensors, output, lse, index = ctx.saved_tensors
        problem = _with_tensors(ctx.problem, tensors)
        return None, *_backward(problem, output, lse, index, d_output, ctx.needs_input_grad[1:])


def _forward(problem: AttentionProblem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, and what the backward pass needs of it: log2 of the sum of exponents, or the chosen keys."""
    query, hard = problem.query, problem.choice.hard
    batch, heads, q_len, _ = query.shape
    output = query.new_empty(batch, heads, q_len, problem.value.shape[-1])
    arguments = common_arguments(problem)
    rows = query.new_empty(batch, heads, arguments["places"], dtype=torch.int32 if hard else torch.float32)
    lse, index = (None, rows) if hard else (rows, None)
    tile = forward_tile(_width(problem), query.dtype, hard)
    programs = batch * heads * _tiles(q_len, arguments["q_shift"], tile.q)
    _launch(forward_kernel, programs, tile, arguments, output_ptr=output, lse_ptr=lse, index_ptr=index)
    return output, lse, index


def _backward(
    problem: AttentionProblem,
    output: Tensor | None,
    lse: Tensor | None,
    index: Tensor | None,
    d_output: Tensor,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of query, key, value, tau and noise_scale; ``None`` for those not wanted."""
    query, choice = problem.query, problem.choice
    batch, heads, q_len, _ = query.shape
    d_output = _rows_contiguous(d_output)
    arguments = common_arguments(problem) | _strides("do", d_output)
    tile = rows_tile(_width(problem), query.dtype, choice.hard)
    tiles = _tiles(q_len, arguments["q_shift"], tile.q)
    inputs = (query, problem.key, problem.value)
    d_q, d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    d_tau, d_noise = (
        query.new_empty(batch, heads, tiles, dtype=torch.float32) if needed else None for needed in wanted[3:]
    )
    delta = query.new_empty(batch, heads, arguments["places"], dtype=torch.float32)
    lse = torch.empty_like(delta) if lse is None else lse
    _launch(
        rows_kernel, batch * heads * tiles, tile, arguments, output_ptr=output, lse_ptr=lse, delta_ptr=delta,
        d_output_ptr=d_output, d_q_ptr=d_q, d_tau_ptr=d_tau, d_noise_ptr=d_noise, D_TAU=d_tau is not None,
        D_NOISE=d_noise is not None,
    )  # fmt: skip
    if wanted[1] or (wanted[2] and not choice.hard):
        tile = columns_tile(_width(problem), query.dtype, choice.hard)
        programs = batch * problem.key.shape[1] * _tiles(problem.key.shape[2], arguments["k_shift"], tile.k)
        arguments |= _seen(problem, grouped=True)
        _launch(
            columns_kernel, programs, tile, arguments, lse_ptr=lse, delta_ptr=delta, d_output_ptr=d_output,
            d_k_ptr=d_k, d_v_ptr=d_v,
        )  # fmt: skip
    if index is not None and wanted[2]:
        first = arguments["q_shift"]
        d_v = _scattered(d_output, index[..., first : first + q_len], problem.value, arguments["survivor"])
    per_head = (_summed(part, x) for part, x in ((d_tau, choice.tau), (d_noise, choice.noise_scale)))
    return [x if needed else None for x, needed in zip((d_q, d_k, d_v, *per_head), wanted, strict=True)]


def common_arguments(problem: AttentionProblem) -> dict[str, Any]:
    """The arguments that all kernels take: inputs, their strides, and what to compile for."""
    query, key, value, choice = problem.query, problem.key, problem.value, problem.choice
    _, heads, q_len, d = query.shape
    k_len, d_v = key.shape[-2], value.shape[-1]
    query, key, value = (_rows_contiguous(x) for x in (query, key, value))
    q_offset, k_offset = problem.q_offset, problem.k_offset
    assert isinstance(q_offset, int)
    assert isinstance(k_offset, int)
    noisy, dropped = choice.noise != "none", problem.dropout_p > 0.0
    arguments: dict[str, Any] = {"q_ptr": query, "k_ptr": key, "v_ptr": value}
    arguments |= _strides("q", query) | _strides("k", key) | _strides("v", value)
    arguments |= _mask("keep", problem.keep, query, k_len) | _mask("bias", problem.bias, query, k_len)
    arguments |= _seen(problem, grouped=False)
    arguments |= _per_head("tau", choice.tau, query) | _per_head("noise_scale", choice.noise_scale, query)
    arguments |= _draws(problem) if noisy or dropped else _NO_DRAWS
    return arguments | {
        "heads": heads, "group": heads // key.shape[1], "q_len": q_len, "k_len": k_len,
        "places": _tiles(q_len, q_offset % POSITION_BLOCK, PLACES) * PLACES,
        "q_shift": q_offset % POSITION_BLOCK, "k_shift": k_offset % POSITION_BLOCK,
        "q_origin": _as_int32(q_offset - q_offset % POSITION_BLOCK),
        "k_origin": _as_int32(k_offset - k_offset % POSITION_BLOCK),
        "reach": max(-q_len, min(k_len, q_offset - k_offset)),
        "scale": problem.scale, "D": d, "BLOCK_D": _power_of_two(d), "DV": d_v, "BLOCK_DV": _power_of_two(d_v),
        "HARD": choice.hard, "NOISE": noisy, "CAUSAL": problem.is_causal, "DROPOUT": dropped,
    }  # fmt: skip


def _launch(kernel: Any, programs: int, tile: Tile, arguments: dict[str, Any], **more: Any) -> None:
    if programs == 0:
        return
    device = arguments["q_ptr"].device
    accepted = {name: x for name, x in (arguments | more).items() if name in kernel.arg_names}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](
            **accepted, BLOCK_Q=tile.q, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages
        )  # fmt: skip


def _mask(name: str, mask: Tensor | None, query: Tensor, k_len: int) -> dict[str, Any]:
    """Pointer and strides of a mask that broadcasts to (B, H, Lq, Lk), never expanded in memory."""
    batch, heads, q_len, _ = query.shape
    kind, strides = ABSENT, [0, 0, 0, 0]
    if mask is not None:
        kind = PER_KEY if mask.shape[-2] == 1 else PER_SCORE
        strides = list(mask.expand(batch, heads, q_len, k_len).stride())
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    keys = (f"{name}_batch", f"{name}_head", f"{name}_q", f"{name}_k")
    return {f"{name}_ptr": mask, name.upper(): kind.value} | dict(zip(keys, strides, strict=True))


def _seen(problem: AttentionProblem, *, grouped: bool) -> dict[str, Any]:
    """Which keys any query of a head sees, or of the group of heads that share a key head."""
    if problem.keep is None:
        return {"seen_ptr": None, "seen_batch": 0, "seen_head": 0}
    batch, heads, _, _ = problem.query.shape
    _, kv_heads, k_len, _ = problem.key.shape
    seen = problem.seen_keys()
    assert seen is not None
    if grouped and seen.shape[1] > 1:
        seen = seen.unflatten(1, (kv_heads, -1)).any(2)
    seen = seen.expand(*seen.shape[:-1], k_len)
    seen = _rows_contiguous(seen.expand(batch, kv_heads if grouped else heads, k_len)).view(torch.uint8)
    return {"seen_ptr": seen, "seen_batch": seen.stride(0), "seen_head": seen.stride(1)}


def _per_head(name: str, x: float | Tensor, query: Tensor) -> dict[str, Any]:
    """A number for all heads or one for each, as a float32 tensor: a new value compiles nothing."""
    if not isinstance(x, Tensor):
        x = torch.full((1,), x, dtype=torch.float32, device=query.device)
    flat = x.to(query.device, torch.float32).reshape(-1).contiguous()
    return {f"{name}_ptr": flat, f"{name}_stride": int(flat.numel() > 1)}


_NO_DRAWS = {"seed_ptr": None, "seed_stride": 0, "seed_heads": 0, "h_offset": 0, "threshold": 0, "survivor": 1.0}


def _draws(problem: AttentionProblem) -> dict[str, Any]:
    """Where the noise comes from: the seed by pointer, how heads count, and dropout's threshold and factor."""
    where, p = problem.choice.where, problem.dropout_p
    assert where is not None
    own = where.seed.ndim == 1
    return {
        "seed_ptr": where.seed, "seed_stride": where.seed.stride(0) if own else 0,
        "seed_heads": 0 if own else where.h_total or where.heads, "h_offset": where.h_offset,
        "threshold": _as_int32(min(round(p * 2**32), 2**32 - 1)), "survivor": 1.0 / (1.0 - p) if p < 1.0 else 0.0,
    }  # fmt: skip


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), x.stride()[:3], strict=True))


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _as_int32(x: int) -> int:
    """The 32 low bits of ``x``, as a signed number."""
    return (x + 2**31) % 2**32 - 2**31


def _power_of_two(d: int) -> int:
    """The width that holds ``d`` columns; matrix products need 16."""
    return max(16, 1 << (d - 1).bit_length())


def _width(problem: AttentionProblem) -> int:
    return max(problem.query.shape[-1], problem.value.shape[-1])


def _tiles(length: int, shift: int, block: int) -> int:
    return -(-(length + shift) // block)


def _summed(parts: Tensor | None, x: float | Tensor) -> Tensor | None:
    """Sums (B, H, tiles) to the shape of ``x``, a tensor for all heads or one for each."""
    if parts is None:
        return None
    assert isinstance(x, Tensor)
    return parts.sum((0, 2))[None, :, None, None].sum_to_size(x.shape).to(x.dtype)


def _scattered(d_output: Tensor, index: Tensor, value: Tensor, survivor: float) -> Tensor:
    """The gradient of the values of a hard choice: each output's goes to the value it took, in float32 sums."""
    batch, kv_heads, k_len, d_v = value.shape
    heads = index.shape[1]
    head = torch.arange(batch * heads, device=index.device).reshape(batch, heads, 1) // (heads // kv_heads)
    row = head * k_len + index.clamp(min=0)
    sent = torch.where(index[..., None] >= 0, d_output * survivor, 0.0).to(torch.float32)
    total = torch.zeros(batch * kv_heads * k_len, d_v, dtype=torch.float32, device=value.device)
    return total.index_add_(0, row.flatten(), sent.reshape(-1, d_v)).reshape(value.shape).to(value.dtype)


def _detached(problem: AttentionProblem) -> AttentionProblem:
    choice = problem.choice
    tensors = (problem.query, problem.key, problem.value, choice.tau, choice.noise_scale)
    return _with_tensors(problem, [x.detach() if isinstance(x, Tensor) else None for x in tensors])


def _with_tensors(problem: AttentionProblem, tensors: Any) -> AttentionProblem:
    """The problem with other tensors in these places; a ``None`` leaves a number for tau or noise_scale as it is."""
    query, key, value, tau, noise_scale = tensors
    choice = problem.choice
    choice = dataclasses.replace(
        choice,
        tau=_number(choice.tau) if tau is None else tau,
        noise_scale=_number(choice.noise_scale) if noise_scale is None else noise_scale,
    )
    return dataclasses.replace(problem, query=query, key=key, value=value, choice=choice)


def _number(x: float | Tensor) -> float:
    """A number as it is; a placeholder for a tensor that is kept elsewhere."""
    return math.nan if isinstance(x, Tensor) else x
