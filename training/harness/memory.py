"""Peak memory of one run beyond its inputs: outputs, gradients and everything in between."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from harness import fresh
from harness.contenders import Attention, Contender, contender_named
from harness.timing import wait

WARM_UP_LENGTH = 64
_PROCESS = Path("/proc/self")


def run_of(attention: Attention, direction: str, inputs: tuple[Tensor, ...], causal: bool) -> Callable[[], object]:
    """One run to time or measure.

    Args:
        attention: a contender's.
        direction: "forward", without autograd, or "forward+backward".
        inputs: query, key, value and the output's gradient.
        causal: whether queries see earlier keys only.
    """
    *qkv, grad = inputs
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return attention(*qkv, causal)

        return forward
    leaves = [x.detach().requires_grad_() for x in qkv]
    return lambda: torch.autograd.grad(attention(*leaves, causal), leaves, grad)


def random_inputs(
    heads: int, length: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Query, key, value and the output's gradient, (1, heads, length, head_dim)."""
    shape = (1, heads, length, head_dim)
    return tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(4))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device; on the CPU, what the system can give without swapping."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def contender_memory(
    contender: Contender, direction: str, heads: int, length: int, head_dim: int, causal: bool, device: torch.device,
    dtype: torch.dtype,
) -> int:  # fmt: skip
    """Bytes that one run of a contender takes beyond its inputs; on the CPU as a fresh process measures them.

    Raises:
        ProcessError: on the CPU, the run failed.
    """
    shape, dtype_name = (heads, length, head_dim), str(dtype).removeprefix("torch.")
    if device.type != "cuda":
        threads = torch.get_num_threads()
        target = f"{__name__}:measure_by_name"
        result: int = fresh.call(target, contender.name, direction, *shape, causal, dtype_name, threads)
        return result
    inputs = random_inputs(*shape, device, dtype)
    run = run_of(contender.attention, direction, inputs, causal)
    run()  # compiles, and allocates workspaces that stay
    return extra_bytes(run, device)


def measure_by_name(
    name: str, direction: str, heads: int, length: int, head_dim: int, causal: bool, dtype: str, threads: int
) -> int:
    """What a fresh process does for :func:`contender_memory` on the CPU."""
    torch.set_num_threads(threads)
    return extra_bytes(warm_run(name, direction, heads, length, head_dim, causal, dtype), torch.device("cpu"))


def warm_run(
    name: str, direction: str, heads: int, length: int, head_dim: int, causal: bool, dtype: str
) -> Callable[[], object]:
    """A run of a contender on the CPU, after a short one that leaves what is made once."""
    device, kind = torch.device("cpu"), getattr(torch, dtype)
    attention = contender_named(name, device).attention
    inputs = random_inputs(heads, length, head_dim, device, kind)
    small = tuple(x[..., :WARM_UP_LENGTH, :] for x in inputs)
    run_of(attention, direction, small, causal)()
    return run_of(attention, direction, inputs, causal)


def extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most memory that was held during a run, less what was held before it.

    On the GPU as torch allocated it; on the CPU the resident size as Linux counts it, which a process can take once
    only: what it has freed before is used again.

    Raises:
        OSError: this system does not let a process reset its peak.
    """
    gc.collect()
    if device.type == "cuda":
        wait(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        wait(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    (_PROCESS / "clear_refs").write_text("5")  # sets the peak to the present size
    before = _kilobytes(_PROCESS / "status", "VmRSS")
    result = run()
    del result
    return _kilobytes(_PROCESS / "status", "VmHWM") - before


def _kilobytes(file: Path, key: str) -> int:
    """A figure of one of Linux's tables, in bytes."""
    match = re.search(rf"^{key}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{file} has no {key}: memory cannot be measured on this system.")
    return int(match[1]) * 1024
