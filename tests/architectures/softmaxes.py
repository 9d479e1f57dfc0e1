"""Which softmaxes a forward pass computes, in which module, and whether this library computes them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gumbel_attention as ga

OURS = str(Path(ga.__file__).parent)
OPS = ("_softmax", "softmax", "_safe_softmax", "logsumexp", "_log_softmax")


@dataclasses.dataclass(frozen=True)
class Site:
    """A softmax of a forward pass.

    Attributes:
        module: the name of the innermost module that was running.
        kind: the class name of this module.
        op: the operator.
        shape: of its input; of the queries for an attention operator.
        dim: what it normalises over.
        ours: whether this library called it.
    """

    module: str
    kind: str
    op: str
    shape: tuple[int, ...]
    dim: int
    ours: bool


class Softmaxes(TorchDispatchMode):
    """Records the softmaxes of the model's forward passes inside a ``with`` block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self._names = {id(module): name for name, module in model.named_modules()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = func._schema.name.removeprefix("aten::")
        if op in OPS or op.startswith("_scaled_dot_product"):
            name, kind, ours = self._where()
            dim = args[1] if op in OPS else -1
            dim = dim[0] if isinstance(dim, list | tuple) else dim
            shape = tuple(args[0].shape)
            self.sites.append(Site(name, kind, op, shape, dim % max(len(shape), 1), ours))
        return func(*args, **(kwargs or {}))

    def _where(self) -> tuple[str, str, bool]:
        frame, ours = sys._getframe(2), False
        while frame is not None:
            ours = ours or frame.f_code.co_filename.startswith(OURS)
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and self._names.get(id(module)) is not None and not ours:
                return self._names[id(module)], type(module).__name__, ours
            if ours and isinstance(module, nn.Module) and self._names.get(id(module)) is not None:
                return self._names[id(module)], type(module).__name__, True
            frame = frame.f_back  # type: ignore[assignment]
        return "", "", ours


def softmaxes(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Site]:
    """The softmaxes of one forward pass without gradients."""
    with torch.no_grad(), Softmaxes(model) as record:
        model(**batch)
    return record.sites
