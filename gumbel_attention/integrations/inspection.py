"""What the source of a module's class says about its attention."""

from __future__ import annotations

import inspect
import re
from weakref import WeakKeyDictionary

from torch import nn

_DISPATCH = re.compile(r"ALL_ATTENTION_FUNCTIONS\s*(\.\s*get_interface\b|\[)")
_SOFTMAX = re.compile(r"\b(softmax|Softmax|scaled_dot_product_attention)\(")
_NAME = re.compile("attention|attn", re.IGNORECASE)
_SOURCES: WeakKeyDictionary[type, str] = WeakKeyDictionary()


def dispatches(cls: type[nn.Module]) -> bool:
    """Whether modules of this class look their attention function up in transformers' registry.

    The first class, of those it inherits from, that either dispatches or has a forward with its own softmax decides.
    """
    for base in _bases(cls):
        source = _source(base)
        if _DISPATCH.search(source):
            return True
        if "forward" in vars(base) and _SOFTMAX.search(source):
            return False
    return False


def computes_own_softmax(cls: type[nn.Module]) -> bool:
    """Whether modules of this class are attention that computes its softmax itself."""
    if dispatches(cls):
        return False
    if issubclass(cls, nn.MultiheadAttention):
        return True
    return bool(_NAME.search(cls.__name__)) and any(_SOFTMAX.search(_source(base)) for base in _bases(cls))


def _bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base not in (nn.Module, object)]


def _source(cls: type) -> str:
    if cls not in _SOURCES:
        try:
            _SOURCES[cls] = inspect.getsource(cls)
        except (OSError, TypeError):  # defined where no file can be read, such as a notebook or a C extension
            _SOURCES[cls] = ""
    return _SOURCES[cls]
