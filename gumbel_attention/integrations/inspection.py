"""What the source of a module's class says about its attention: whether there is any, and the way to reach it."""

from __future__ import annotations

import inspect
import re
from typing import Literal
from weakref import WeakKeyDictionary

from torch import nn

from .rewriting import original, softmax_calls

_DISPATCH = re.compile(r"ALL_ATTENTION_FUNCTIONS\s*(\.\s*get_interface\b|\[)")
_SOFTMAX = re.compile(r"\b(softmax|Softmax|scaled_dot_product_attention)\(")
_NAME = re.compile("attention|attn", re.IGNORECASE)
_PACKAGE = re.compile(r"\.models\.(\w+)\.")
_SOURCES: WeakKeyDictionary[type, str] = WeakKeyDictionary()
Way = Literal["registry", "rewrite", "both"]
_WAYS: WeakKeyDictionary[type, Way | None] = WeakKeyDictionary()

NO_SOFTMAX = {
    "mamba": "a state space model has no attention weights",
    "mamba2": "a state space model has no attention weights",
    "falcon_mamba": "a state space model has no attention weights",
    "rwkv": "its recurrence weighs by decay, without a softmax over keys",
    "xlstm": "its memory is recurrent, without a softmax over keys",
    "fnet": "it mixes tokens by a Fourier transform",
    "reformer": "it attends within hash buckets and joins rounds by logsumexp, without a softmax call",
    "yoso": "it samples by hashing in place of a softmax",
    "mra": "its multi-resolution approximation exponentiates blocks, without a softmax call",
    "ibert": "its softmax is integer arithmetic on quantised scores, which is not torch's softmax",
}
"""Architectures of transformers without a softmax that could be replaced, and why."""
NOT_OVER_TOKENS = ("Inkling2BlockAttentionResidual",)
"""Classes whose softmax weighs something else than tokens: the layers of one token, for example."""


def way_in(cls: type[nn.Module]) -> Way | None:
    """How the attention of modules of this class is reached.

    Returns:
        ``"registry"``: they look their attention function up; ``"rewrite"``: their methods compute a softmax of their
        own; ``"both"``: either, by a setting or from call to call; ``None``: there is nothing to replace.
    """
    cls = original(cls)
    if cls not in _WAYS:
        _WAYS[cls] = _way_in(cls)
    return _WAYS[cls]


def _way_in(cls: type[nn.Module]) -> Way | None:
    if architecture(cls) in NO_SOFTMAX or cls.__name__ in NOT_OVER_TOKENS:
        return None
    by_registry, by_rewriting = dispatches(cls), bool(softmax_calls(cls))
    if by_registry and by_rewriting:
        return "both"
    if by_registry:
        return "registry"
    return "rewrite" if by_rewriting else None


def why_not(cls: type[nn.Module]) -> str | None:
    """Why a class that looks like attention cannot be reached; ``None`` where it can or does not look like it."""
    cls = original(cls)
    if way_in(cls) is not None or cls.__name__ in NOT_OVER_TOKENS:
        return None
    if issubclass(cls, nn.MultiheadAttention):
        return "torch computes its softmax inside nn.MultiheadAttention: exchange it for GumbelMultiheadAttention"
    known = NO_SOFTMAX.get(architecture(cls) or "")
    if not _NAME.search(cls.__name__):
        return None
    if known is not None:
        return known
    if any(_SOFTMAX.search(source_of(base)) for base in _bases(cls)):
        return "its softmax is not taken over scores of queries and keys"
    return None


def architecture(cls: type) -> str | None:
    """The package of transformers' models in which a class, or one it inherits from, is defined."""
    found = (_PACKAGE.search(base.__module__ + ".") for base in cls.__mro__)
    return next((match.group(1) for match in found if match), None)


def dispatches(cls: type[nn.Module]) -> bool:
    """Whether modules of this class look their attention function up in transformers' registry.

    The first class, of those it inherits from, that either dispatches or has a forward with its own softmax decides.
    """
    for base in _bases(cls):
        source = source_of(base)
        if _DISPATCH.search(source):
            return True
        if "forward" in vars(base) and _SOFTMAX.search(source):
            return False
    return False


def _bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base not in (nn.Module, object)]


def source_of(cls: type) -> str:
    """The source of a class; empty where it cannot be read."""
    if cls not in _SOURCES:
        try:
            _SOURCES[cls] = inspect.getsource(cls)
        except (OSError, TypeError):  # defined where no file can be read, such as a notebook or a C extension
            _SOURCES[cls] = ""
    return _SOURCES[cls]
