"""Tells once that a configuration carries Gumbel attention settings which a plain load does not restore."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers import PretrainedConfig

from .saved_settings import KEY, RESTORE, is_entry

_expected: ContextVar[bool] = ContextVar("gumbel_attention_settings_expected", default=False)


class CarriedSettings:
    """The attribute of a configuration that holds saved settings: a plain one but for the first time it is set."""

    def __init__(self) -> None:
        self.told = False

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        if config is None:
            return self
        try:
            return vars(config)[KEY]
        except KeyError:
            raise AttributeError(f"{type(config).__name__!r} object has no attribute {KEY!r}") from None

    def __set__(self, config: Any, value: Any) -> None:
        vars(config)[KEY] = value
        of_a_model = bool(config.model_type)  # Trainer reads the file it resumes from into one of no model
        if is_entry(value) and of_a_model and not self.told and not _expected.get():
            self.told = True
            warnings.warn(
                "this configuration was saved by a model with Gumbel attention, and transformers alone gives the "
                f"model its plain softmax. Load weights and attention with {RESTORE}(model_class, path), or call "
                "gumbel_attention.patch_model(model) on the loaded model.",
                UserWarning,
                stacklevel=2,
            )

    def __delete__(self, config: Any) -> None:
        vars(config).pop(KEY, None)


@contextmanager
def settings_expected() -> Iterator[None]:
    """Says nothing of settings that are read within."""
    token = _expected.set(True)
    try:
        yield
    finally:
        _expected.reset(token)


setattr(PretrainedConfig, KEY, CarriedSettings())
