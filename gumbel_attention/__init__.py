"""Attention that samples: Gumbel-softmax and straight-through hard attention for PyTorch and transformers."""

from typing import TYPE_CHECKING, Any

from .config import GumbelAttentionConfig
from .functional import (
    AttentionInfo,
    Explanation,
    explain,
    gumbel_attention,
    gumbel_attention_with_info,
    gumbel_softmax,
)
from .modules import GumbelMultiheadAttention, GumbelSetAttention, SetAttentionOutput
from .schedules import temperature_schedule
from .version import __version__

if TYPE_CHECKING:
    from .integrations.transformers import ModelPatch, patch_model

__all__ = [
    "AttentionInfo",
    "Explanation",
    "GumbelAttentionConfig",
    "GumbelMultiheadAttention",
    "GumbelSetAttention",
    "ModelPatch",
    "SetAttentionOutput",
    "__version__",
    "explain",
    "gumbel_attention",
    "gumbel_attention_with_info",
    "gumbel_softmax",
    "patch_model",
    "temperature_schedule",
]


def __getattr__(name: str) -> Any:
    """Imports transformers only when a name that needs it is asked for."""
    if name in ("ModelPatch", "patch_model"):
        from .integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
