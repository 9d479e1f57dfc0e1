"""What a patched attention module carries, whichever way Gumbel attention got in."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..config import GumbelAttentionConfig
from ..state import AttentionState

CHILD = "gumbel"
"""The name of the state among the children of a patched module."""


class PatchedState(AttentionState):
    """The state of a patched module: a child of it, put in by :meth:`enter` and taken out by :meth:`leave`.

    Args:
        config: the settings.
        num_heads: query heads of the module.
        module: the module, for the device and the mode.

    Attributes:
        way: the way in, in a word.
        ran: whether Gumbel attention has run in this module.
        patch_number: which patch of the model it belongs to, counting from 1.
    """

    way = ""

    def __init__(self, config: GumbelAttentionConfig, num_heads: int, module: nn.Module) -> None:
        super().__init__(config, num_heads, _device(module))
        self.ran = False
        self.patch_number = 1
        self.train(module.training)

    def enter(self, module: nn.Module) -> None:
        """Becomes a child of the module, which from then on attends our way."""
        module.add_module(CHILD, self)
        module.register_forward_hook(_check_ran)

    def leave(self, module: nn.Module) -> None:
        """Undoes :meth:`enter`."""
        _forget_check(module)
        delattr(module, CHILD)

    def follow(self, parent: nn.Module, name: str) -> None:
        """Stays in force where ``parent`` exchanges its attention ``name`` while it runs, as BigBird's layers do."""
        if hasattr(parent, "set_attention_type"):
            parent.register_forward_pre_hook(functools.partial(_move_along, self, name))

    def note_run(self) -> None:
        """Notes that Gumbel attention ran; compilers do not see it."""
        if not torch.compiler.is_compiling():
            self.ran = True


def state_of(module: nn.Module) -> PatchedState | None:
    """The state of a patched module: its child, or the active copy of it where PEFT keeps copies (modules_to_save)."""
    child: Any = getattr(module, CHILD, None)
    copies = getattr(child, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        name = next(iter(child.active_adapters), "")
        child = child.original_module if child.disable_adapters or name not in copies else copies[name]
    return child if isinstance(child, PatchedState) else None


def _move_along(state: PatchedState, name: str, parent: nn.Module, args: object) -> None:
    """A forward pre-hook of a module that exchanges its attention: the state enters the one that is there now."""
    now = getattr(parent, name)
    if state_of(now) is not state:
        state.enter(now)


def stop_following(parent: nn.Module, state: PatchedState) -> None:
    """Undoes :meth:`PatchedState.follow`."""
    for key, hook in list(parent._forward_pre_hooks.items()):
        if isinstance(hook, functools.partial) and hook.func is _move_along and hook.args[0] is state:
            del parent._forward_pre_hooks[key]


def _check_ran(module: nn.Module, args: object, output: object) -> None:
    """A forward hook for the first call of a patched module: raises if it attended without us."""
    if torch.compiler.is_compiling():
        return
    state = state_of(module)
    if state is not None and not state.ran:
        raise RuntimeError(
            f"{type(module).__name__} is patched, but its forward pass did not come to Gumbel attention: it computes "
            "its attention elsewhere for these arguments. Remove the patch, or leave this layer out of it."
        )
    _forget_check(module)


def _forget_check(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_hooks.items() if hook is _check_ran]:
        del module._forward_hooks[key]


def _device(module: nn.Module) -> torch.device | None:
    """Where the module computes: where its weights are, or where Accelerate brings offloaded weights."""
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    first: Tensor | None = next(module.parameters(), None)
    return None if first is None else first.device
