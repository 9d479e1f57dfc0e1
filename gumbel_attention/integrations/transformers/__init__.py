"""Gumbel attention in models of the transformers library: the only package here that imports it."""

from .patch import ModelPatch
from .patching import patch_model
from .predictions import SampledPredictions, sample_predictions
from .saving import from_pretrained, load_patch, patch_of, save_patch
from .trainer import GumbelAttentionCallback

__all__ = [
    "GumbelAttentionCallback",
    "ModelPatch",
    "SampledPredictions",
    "from_pretrained",
    "load_patch",
    "patch_model",
    "patch_of",
    "sample_predictions",
    "save_patch",
]
