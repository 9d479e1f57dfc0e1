"""The answers of ``device`` as constants of a compiled graph.

A module of its own, imported by a compiler only: ``assume_constant_result`` imports torch's whole compiler.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import torch

from . import device


@torch.compiler.assume_constant_result
def unavailable() -> str | None:
    """``device.unavailable()``."""
    return device.unavailable()


@torch.compiler.assume_constant_result
def wrong_device(of: torch.device) -> str | None:
    """``device.wrong_device(of)``."""
    return device.wrong_device(of)
