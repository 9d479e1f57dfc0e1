"""Attention that samples: Gumbel-softmax and straight-through hard attention for PyTorch and transformers."""

from typing import TYPE_CHECKING, Any

from .config import GumbelAttentionConfig
from .diagnostics import CollectedDiagnostics, collect_diagnostics
from .functional import (
    AttentionInfo,
    Explanation,
    SoftmaxInfo,
    explain,
    gumbel_attention,
    gumbel_attention_with_info,
    gumbel_softmax,
    gumbel_softmax_with_info,
)
from .modules import GumbelMultiheadAttention, GumbelSetAttention, SetAttentionOutput
from .schedules import temperature_schedule
from .score_function import (
    CollectedLogProbs,
    MovingAverageBaseline,
    collect_log_probs,
    leave_one_out,
    score_function_loss,
    soft_attention,
)
from .version import __version__

if TYPE_CHECKING:
    from .integrations.transformers import (
        GumbelAttentionCallback,
        ModelPatch,
        SampledPredictions,
        from_pretrained,
        load_patch,
        patch_model,
        patch_of,
        sample_predictions,
        save_patch,
    )

__all__ = [
    "AttentionInfo",
    "CollectedDiagnostics",
    "CollectedLogProbs",
    "Explanation",
    "GumbelAttentionCallback",
    "GumbelAttentionConfig",
    "GumbelMultiheadAttention",
    "GumbelSetAttention",
    "ModelPatch",
    "MovingAverageBaseline",
    "SampledPredictions",
    "SetAttentionOutput",
    "SoftmaxInfo",
    "__version__",
    "collect_diagnostics",
    "collect_log_probs",
    "explain",
    "from_pretrained",
    "gumbel_attention",
    "gumbel_attention_with_info",
    "gumbel_softmax",
    "gumbel_softmax_with_info",
    "leave_one_out",
    "load_patch",
    "patch_model",
    "patch_of",
    "sample_predictions",
    "save_patch",
    "score_function_loss",
    "soft_attention",
    "temperature_schedule",
]

_NEED_TRANSFORMERS = (
    "GumbelAttentionCallback",
    "ModelPatch",
    "SampledPredictions",
    "from_pretrained",
    "load_patch",
    "patch_model",
    "patch_of",
    "sample_predictions",
    "save_patch",
)


def __getattr__(name: str) -> Any:
    """Imports transformers only when a name that needs it is asked for."""
    if name in _NEED_TRANSFORMERS:
        from .integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
