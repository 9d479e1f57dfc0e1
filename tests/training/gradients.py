"""The gradients that an optimiser gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


@contextmanager
def seen_gradients() -> Iterator[list[torch.Tensor]]:
    """The list gets the gradients of every optimiser step, all parameters in one vector."""
    seen: list[torch.Tensor] = []

    def look(optimizer: Any, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        seen.append(torch.cat([parameter.grad.detach().flatten() for parameter in parameters]))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()
