"""From a problem to kernel launches: their arguments, and the tensors they fill.

Nothing here reads a tensor's value: there is no synchronisation, and a CUDA graph may capture the launches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem import AttentionProblem
from .columns import columns_kernel
from .forward import forward_kernel
from .rows import rows_kernel
from .sizes import (
    LEAST_SHARED_MEMORY,
    PLACES,
    POSITION_BLOCK,
    Tile,
    columns_tile,
    forward_tile,
    places,
    rows_tile,
    tiles,
)
from .tiles import ABSENT, PER_KEY, PER_SCORE

MAX_ROW_STRIDE = 2**24 - 1
"""The distance of two rows of a tile, at most 127 of these, fits in 31 bits."""


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output, and of each row what the backward pass needs: log2 of the sum of exponents, or the chosen key."""
    query, hard = problem.query, problem.choice.hard
    batch, heads, q_len, _ = query.shape
    output = query.new_empty(batch, heads, q_len, problem.value.shape[-1])
    arguments = common_arguments(problem)
    tile = kernel_tile(forward_tile, problem)
    empty = torch.empty if tile.q == PLACES else torch.zeros  # the last tile may end before the last place
    dtype = torch.int32 if hard else torch.float32
    rows = empty(batch, heads, arguments["places"], dtype=dtype, device=query.device)
    lse, index = (None, rows) if hard else (rows, None)
    programs = batch * heads * tiles(q_len, arguments["q_shift"], tile.q)
    _launch(forward_kernel, programs, tile, arguments, output_ptr=output, lse_ptr=lse, index_ptr=index)
    return output, rows


def backward(
    problem: AttentionProblem, output: Tensor | None, rows: Tensor, d_output: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of query, key, value, tau and noise_scale; ``None`` for those not wanted.

    Args:
        problem: what was computed; tau and noise_scale are tensors, of one number or one for each head.
        output: the output of relaxed weights, ``None`` after a hard choice.
        rows: as ``forward`` gave them.
        d_output: the gradient of the output.
        wanted: which gradients.
    """
    query, choice = problem.query, problem.choice
    batch, heads, q_len, _ = query.shape
    d_output = _addressable(d_output)
    arguments = common_arguments(problem) | _strides("do", d_output)
    tile = kernel_tile(rows_tile, problem)
    row_tiles = tiles(q_len, arguments["q_shift"], tile.q)
    inputs = (query, problem.key, problem.value)
    d_q, d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    d_tau, d_noise = (
        query.new_empty(batch, heads, row_tiles, dtype=torch.float32) if needed else None for needed in wanted[3:]
    )
    delta = query.new_empty(batch, heads, arguments["places"], dtype=torch.float32)
    lse = torch.empty_like(delta) if choice.hard else rows
    _launch(
        rows_kernel, batch * heads * row_tiles, tile, arguments, output_ptr=output, lse_ptr=lse, delta_ptr=delta,
        d_output_ptr=d_output, d_q_ptr=d_q, d_tau_ptr=d_tau, d_noise_ptr=d_noise, D_TAU=d_tau is not None,
        D_NOISE=d_noise is not None,
    )  # fmt: skip
    if wanted[1] or (wanted[2] and not choice.hard):
        tile = kernel_tile(columns_tile, problem)
        programs = batch * problem.key.shape[1] * tiles(problem.key.shape[2], arguments["k_shift"], tile.k)
        arguments |= _seen(problem, grouped=True)
        _launch(
            columns_kernel, programs, tile, arguments, lse_ptr=lse, delta_ptr=delta, d_output_ptr=d_output,
            d_k_ptr=d_k, d_v_ptr=d_v,
        )  # fmt: skip
    if choice.hard and wanted[2]:
        first = arguments["q_shift"]
        d_v = _scattered(d_output, rows[..., first : first + q_len], problem.value, arguments["survivor"])
    numbers = (_summed(part, x) for part, x in ((d_tau, choice.tau), (d_noise, choice.noise_scale)))
    return [x if needed else None for x, needed in zip((d_q, d_k, d_v, *numbers), wanted, strict=True)]


def kernel_tile(chooser: Callable[[int, torch.dtype, bool, int], Tile], problem: AttentionProblem) -> Tile:
    """The tile that ``forward_tile``, ``rows_tile`` or ``columns_tile`` gives a problem on its device."""
    query, width = problem.query, max(problem.query.shape[-1], problem.value.shape[-1])
    tile = chooser(width, query.dtype, problem.choice.hard, _shared_memory(query.device))
    per_score = problem.keep is not None and problem.keep.shape[-2] > 1
    return tile._replace(stages=1) if per_score else tile  # later stages' masks would fill the shared memory


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; as much as the smallest GPU's for want of a GPU."""
    if device.type != "cuda":
        return LEAST_SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub leaves a property out
    return int(properties.shared_memory_per_block_optin)


def common_arguments(problem: AttentionProblem) -> dict[str, Any]:
    """The arguments that all kernels take: inputs, their strides, and what to compile for."""
    query, key, value, choice = problem.query, problem.key, problem.value, problem.choice
    _, heads, q_len, d = query.shape
    k_len, d_v = key.shape[-2], value.shape[-1]
    query, key, value = (_addressable(x) for x in (query, key, value))
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
        "places": places(q_len, q_offset),
        "q_shift": q_offset % POSITION_BLOCK, "k_shift": k_offset % POSITION_BLOCK,
        "q_origin": _as_int32(q_offset - q_offset % POSITION_BLOCK),
        "k_origin": _as_int32(k_offset - k_offset % POSITION_BLOCK),
        "reach": max(-q_len, min(k_len, q_offset - k_offset)),
        "scale": problem.scale, "D": d, "BLOCK_D": _power_of_two(d), "DV": d_v, "BLOCK_DV": _power_of_two(d_v),
        "HARD": choice.hard, "NOISE": noisy, "CAUSAL": problem.is_causal, "DROPOUT": dropped,
    }  # fmt: skip


def _launch(kernel: Any, programs: int, tile: Tile, arguments: dict[str, Any], **more: Any) -> None:
    """Runs a kernel on the tensors' device.

    Raises:
        RuntimeError: it could not be compiled or started here.
    """
    if programs == 0:
        return
    query = arguments["q_ptr"]
    accepted = {name: x for name, x in (arguments | more).items() if name in kernel.arg_names}
    try:
        with torch.cuda.device(query.device) if query.device.type == "cuda" else contextlib.nullcontext():
            kernel[(programs,)](
                **accepted, BLOCK_Q=tile.q, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages
            )  # fmt: skip
    except Exception as error:  # triton, its compilers, the C compiler and the driver each have their own
        raise RuntimeError(
            f"impl='triton' could not compile or start {kernel.fn.__name__} for head dimensions {arguments['D']} and "
            f"{arguments['DV']} in {query.dtype}: {type(error).__name__}: {_beginning(str(error))} "
            "Use impl='blockwise', which needs no compiler."
        ) from error


def _beginning(message: str) -> str:
    """A compiler's message without the code it quotes."""
    return message if len(message) <= 300 else f"{message[:300]} ..."


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
    seen = _addressable(seen.expand(batch, kv_heads if grouped else heads, k_len)).view(torch.uint8)
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


def _addressable(x: Tensor) -> Tensor:
    """A tensor whose rows are contiguous and near enough to each other, copied where ``x`` is not like that."""
    return x if x.stride(-1) == 1 and x.stride(-2) <= MAX_ROW_STRIDE else x.contiguous()


def _as_int32(x: int) -> int:
    """The 32 low bits of ``x``, as a signed number."""
    return (x + 2**31) % 2**32 - 2**31


def _power_of_two(d: int) -> int:
    """The width that holds ``d`` columns; matrix products need 16."""
    return max(16, 1 << (d - 1).bit_length())


def _summed(parts: Tensor | None, x: float | Tensor) -> Tensor | None:
    """Sums (B, H, tiles) to the shape of ``x``, (1,) or (H,)."""
    if parts is None:
        return None
    assert isinstance(x, Tensor)
    return parts.sum((0, 2)).sum_to_size(x.shape)


def _scattered(d_output: Tensor, index: Tensor, value: Tensor, survivor: float) -> Tensor:
    """The gradient of the values of a hard choice: each output's goes to the value it took, in float32 sums."""
    batch, kv_heads, k_len, d_v = value.shape
    heads = index.shape[1]
    head = torch.arange(batch * heads, device=index.device).reshape(batch, heads, 1) // (heads // kv_heads)
    row = head * k_len + index.clamp(min=0)
    sent = torch.where(index[..., None] >= 0, d_output * survivor, 0.0).to(torch.float32)
    total = torch.zeros(batch * kv_heads * k_len, d_v, dtype=torch.float32, device=value.device)
    return total.index_add_(0, row.flatten(), sent.reshape(-1, d_v)).reshape(value.shape).to(value.dtype)
