"""Gumbel attention in models of the transformers library: the only package here that imports it."""

from .patch import ModelPatch
from .patching import patch_model

__all__ = ["ModelPatch", "patch_model"]
