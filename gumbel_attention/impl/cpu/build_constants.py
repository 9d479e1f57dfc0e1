"""Whether the kernels can be used, as a constant of a compiled graph.

A module of its own, imported by a compiler only: ``assume_constant_result`` imports torch's whole compiler.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import torch

from . import ops


@torch.compiler.assume_constant_result
def unavailable() -> str | None:
    """``ops.unavailable()``."""
    return ops.unavailable()
