"""Whether kernels can run on this machine and on a device."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

from .sizes import LEAST_SHARED_MEMORY, interpreting


@functools.cache
def unavailable() -> str | None:
    """Why no kernel can run here; ``None`` where they can. Imports triton where there is a GPU for it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "there is no CUDA device"
    if not interpreting() and torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this torch is for AMD's"
    try:
        importlib.import_module(".launch", __package__)
    except Exception as error:  # broken installations fail in many ways
        return f"triton cannot be imported: {_first_line(error)}"
    return None if interpreting() else _no_launcher()


def _no_launcher() -> str | None:
    """Why triton can launch no kernel whatever it is: it builds its launcher with a C compiler."""
    import triton

    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # no compiler, no headers of Python, no libcuda: each its own
        return f"triton cannot start kernels: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def wrong_device(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; ``None`` where they can."""
    if interpreting():
        return None
    if device.type != "cuda":
        return f"the tensors must be on an NVIDIA GPU, got {device}"
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub leaves a property out
    if properties.major < 8:
        return f"the GPU must have compute capability 8.0 or more, got {properties.major}.{properties.minor}"
    shared = properties.shared_memory_per_block_optin
    if shared < LEAST_SHARED_MEMORY:
        return f"a program needs {LEAST_SHARED_MEMORY} bytes of shared memory, the GPU has {shared}"
    return None
