"""Attention that samples: Gumbel-softmax and straight-through hard attention for PyTorch and transformers."""

from .config import GumbelAttentionConfig
from .functional import AttentionInfo, gumbel_attention, gumbel_attention_with_info, gumbel_softmax
from .schedules import temperature_schedule
from .version import __version__

__all__ = [
    "AttentionInfo",
    "GumbelAttentionConfig",
    "__version__",
    "gumbel_attention",
    "gumbel_attention_with_info",
    "gumbel_softmax",
    "temperature_schedule",
]
