"""A configuration seen with other eyes: the same settings, with another attention implementation's name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig

_INTERNAL = "_attn_implementation_internal"
_SLOTS = ("_view_extra", "_view_implementation", "_view_instead_of", "_view_owner", "_view_source")
_VIEW_CLASSES: dict[type[PretrainedConfig], type[PretrainedConfig]] = {}


def config_view(
    owner: nn.Module,
    implementation: str | None = None,
    extra: Callable[[nn.Module], dict[str, Any]] | None = None,
    instead_of: str | None = None,
) -> PretrainedConfig:
    """What ``owner.config`` is in all but two respects; both share their settings, and a change of one is one of both.

    A copy or a pickle of the owner has a view of its own; a copy of the view alone is a plain configuration.

    Args:
        owner: the module whose config it is to be.
        implementation: the attention implementation that the view names; ``None``: the config's own.
        extra: gives what ``to_dict`` of the view, and so a saved file, says beyond the settings.
        instead_of: names ``implementation`` only while this is the config's own; ``None``: always.
    """
    source = plain_config(cast(PretrainedConfig, owner.config))
    return _filled(_empty(type(source)), (extra, implementation, instead_of, owner, source))


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration that a view shows; any other configuration itself."""
    return getattr(config, "_view_source", config)


def _empty(cls: type[PretrainedConfig]) -> PretrainedConfig:
    return object.__new__(_view_class(cls))


def _filled(view: PretrainedConfig, state: tuple[Any, ...]) -> PretrainedConfig:
    for name, value in zip(_SLOTS, state, strict=True):
        object.__setattr__(view, name, value)
    object.__setattr__(view, "__dict__", vars(state[-1]))
    return view


def _state(view: Any) -> tuple[Any, ...]:
    return tuple(getattr(view, name) for name in _SLOTS)


def _view_class(cls: type[PretrainedConfig]) -> type[PretrainedConfig]:
    if cls not in _VIEW_CLASSES:
        _VIEW_CLASSES[cls] = _make_view_class(cls)
    return _VIEW_CLASSES[cls]


def _make_view_class(cls: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """A subclass under the same name: transformers finds what belongs to a config by its class's name."""

    def implementation(self: Any) -> str | None:
        name: str | None = getattr(self, "_view_implementation", None)
        own: str | None = vars(self).get(_INTERNAL)
        return own if name is None or getattr(self, "_view_instead_of", None) not in (None, own) else name

    def set_implementation(self: Any, value: str | None) -> None:
        if value is None or value != getattr(self, "_view_implementation", None):
            vars(self)[_INTERNAL] = value  # and no more of our name: transformers writes back what it has read

    def to_dict(self: Any) -> dict[str, Any]:
        extra = getattr(self, "_view_extra", None)
        return {**cls.to_dict(self), **({} if extra is None else extra(self._view_owner))}

    def deep_copy(self: Any, memo: dict[int, Any]) -> PretrainedConfig:
        extra, name, instead_of, owner, source = _state(self)
        copied: PretrainedConfig = copy.deepcopy(source, memo)
        return (
            copied
            if id(owner) not in memo
            else _filled(_empty(cls), (extra, name, instead_of, memo[id(owner)], copied))
        )

    def shallow_copy(self: Any) -> PretrainedConfig:
        return copy.copy(plain_config(self))

    def reduce(self: Any, protocol: Any) -> Any:
        return _empty, (cls,), _state(self)

    return type(
        cls.__name__,
        (cls,),
        {
            "__slots__": _SLOTS,
            "__doc__": cls.__doc__,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__deepcopy__": deep_copy,
            "__copy__": shallow_copy,
            "__reduce_ex__": reduce,
            "__setstate__": _filled,
            _INTERNAL: property(implementation, set_implementation),
            "to_dict": to_dict,
        },
    )
