"""One architecture under test: its tiny models, what they are fed, and what comes out."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

import gumbel_attention as ga

from . import tiny
from .catalogue import Architecture, architecture
from .softmaxes import Site, softmaxes

LENGTH = 13
DECODER_LENGTH = 7
PADDINGS = ("none", "right", "left")
Config = ga.GumbelAttentionConfig
PLAIN = Config(noise="none")
HARD = Config(noise="none", hard=True)
NOISY = Config(hard=True)
ARMS = {
    "softmax-tau": Config(noise="none", tau=0.5),
    "gumbel-soft": Config(tau=0.5, eval_noise=True),
    "gumbel-st": Config(hard=True, eval_noise=True),
    "det-st": HARD,
}
DECODERS_OF_OTHERS = ("trocr",)
"""Decoders whose cross attention runs only with the states of some encoder."""
NO_TOKENS = {  # ends of class names: their softmaxes over the last of three or more dimensions are not over tokens
    "BltPatcher": "the entropy of the next byte decides where a patch ends",
    "HyperConnection": "mixes residual streams",
    "Router": "chooses experts",
    "Inkling2BlockAttentionResidual": "weighs the outputs of earlier layers",
}


class Case:
    """An architecture with its models, built once and copied for each check."""

    def __init__(self, name: str) -> None:
        found = architecture(name)
        assert found is not None, f"transformers has no model of the type {name!r}"
        self.architecture: Architecture = found
        self.name = name
        self._models: dict[str | None, Any] = {}

    @functools.cached_property
    def refusal(self) -> str:
        """What patch_model says where it refuses the model, otherwise nothing."""
        try:
            ga.patch_model(self.model(), HARD)
        except ValueError as error:
            return str(error)
        return ""

    @functools.cached_property
    def attention(self) -> list[Site]:
        """The softmaxes over tokens of the unpatched model."""
        return over_tokens(softmaxes(self.model("eager"), self.inputs("none")))

    @functools.cached_property
    def implementations(self) -> list[str]:
        """Those that the model supports, of the two whose masks a patched model reads."""
        return ["eager", "sdpa"] if self._built(None).config._attn_implementation == "sdpa" else ["eager"]

    def model(self, implementation: str | None = None) -> Any:
        """A copy of the model in eval mode."""
        return copy.deepcopy(self._built(implementation))

    def _built(self, implementation: str | None) -> Any:
        if implementation not in self._models:
            self._models[implementation] = tiny.build(self.architecture, implementation)
        return self._models[implementation]

    def inputs(self, padding: str = "none") -> dict[str, Tensor]:
        """Three rows of token ids, two of them padded, and some decoder tokens for an encoder-decoder."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, tiny.VOCAB - 2, (3, LENGTH), generator=generator)
        keep = torch.ones_like(ids)
        if padding != "none":
            keep[0, LENGTH - 4 :] = 0
            keep[1, LENGTH - 7 :] = 0
            keep = keep if padding == "right" else keep.flip(1)
        batch = {"input_ids": ids, "attention_mask": keep}
        config = self._built(None).config
        if config.is_encoder_decoder:
            batch["decoder_input_ids"] = torch.randint(5, tiny.VOCAB - 2, (3, DECODER_LENGTH), generator=generator)
        elif self.name in DECODERS_OF_OTHERS:
            batch["encoder_hidden_states"] = torch.randn(3, DECODER_LENGTH, config.hidden_size, generator=generator)
        return batch


def over_tokens(sites: list[Site]) -> list[Site]:
    """The softmaxes that look like attention: over the last of three or more dimensions, and of no other purpose."""
    return [
        site
        for site in sites
        if len(site.shape) >= 3 and site.dim == len(site.shape) - 1 and not site.kind.endswith(tuple(NO_TOKENS))
    ]


def output(model: Any, batch: dict[str, Tensor], seed: int | None = None) -> Tensor:
    """The first tensor that the model returns."""
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        result: Tensor = model(**batch)[0]
    return result


def real(batch: dict[str, Tensor], values: Tensor) -> Tensor:
    """The values at positions that are not padding."""
    if "decoder_input_ids" in batch or values.shape[:2] != batch["attention_mask"].shape:
        return values
    return values[batch["attention_mask"].bool()]


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value where that exceeds one; NaN where either is."""
    return ((one - other).abs().max() / other.abs().max().clamp(min=1.0)).item()


def changed_at(batch: dict[str, Tensor], key: str, where: Tensor) -> dict[str, Tensor]:
    """The batch with other token ids at some places."""
    ids = batch[key]
    other = (ids - 5 + 17) % (tiny.VOCAB - 7) + 5
    return {**batch, key: torch.where(where, other, ids)}
