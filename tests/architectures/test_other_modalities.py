"""Architectures that read more than text: what patch_model reaches of them. Only with ``--all-architectures``."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gumbel_attention as ga
from models import fingerprint

from . import tiny
from .case import HARD, PLAIN, difference, over_tokens
from .catalogue import Architecture, architecture
from .softmaxes import softmaxes

CLOSE = 1e-5
CHANNELS, SIDES, FRAMES = 3, (32, 64, 224), 8


def _built(found: Architecture, implementation: str | None) -> Any:
    """A tiny model, or a skipped test: the defaults of these types do not all shrink."""
    try:
        model = tiny.build(found, implementation)
    except Exception as error:
        pytest.skip(f"no tiny configuration: {type(error).__name__}")
    if sum(parameter.numel() for parameter in model.parameters()) > 20_000_000:
        pytest.skip("no tiny configuration: too large")
    return model


def _guesses(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs that fit many models: pictures, films, sound waves, spectrograms, token ids, and pairs of these."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    ids = torch.randint(5, tiny.VOCAB - 2, (2, 13), generator=generator)
    parameters = inspect.signature(model.forward).parameters
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if "input_ids" in parameters else {}
    seen: list[dict[str, Tensor]] = []
    if "pixel_values" in parameters:
        seen += [{"pixel_values": normal(CHANNELS, side, side)} for side in SIDES]
        seen += [{"pixel_values": normal(FRAMES, CHANNELS, 32, 32)}]
    if "pixel_values_videos" in parameters:
        seen += [{"pixel_values_videos": normal(FRAMES, CHANNELS, 32, 32)}]
    if "input_values" in parameters:
        seen += [{"input_values": normal(*shape)} for shape in ((4000,), (1, 4000), (1024, 128))]
    if "input_features" in parameters:
        shapes = itertools.permutations((80, 128), 2)
        seen += [{"input_features": normal(*shape)} for shape in ((80, 128), (128, 80), (128, 128), *shapes)]
    yield from (text | one for one in seen)
    if text:
        yield text
    yield from seen


def _tensors(result: Any) -> list[Tensor]:
    values = result.values() if isinstance(result, dict) else result if isinstance(result, list | tuple) else [result]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _outputs(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return _tensors(model(**batch))


def _fitting(model: Any) -> tuple[dict[str, Tensor], list[Tensor]] | None:
    for batch in _guesses(model):
        try:
            outputs = _outputs(model, batch)
        except Exception:  # a guess that does not fit
            continue
        if outputs and all(value.isfinite().all() for value in outputs):
            return batch, outputs
    return None


def test_it_is_patched_or_refused_and_without_noise_equals_eager(other, record_property):
    found = architecture(other)
    record_property("modality", found.modality)
    model, eager = _built(found, None), _built(found, "eager")
    before = fingerprint(model)
    try:
        patch = ga.patch_model(model, PLAIN)
    except ValueError as error:
        assert fingerprint(model) == before
        record_property("refused", str(error))
        return
    patch.remove()
    assert fingerprint(model) == before
    patch = ga.patch_model(model, PLAIN)
    record_property("ways", sorted({layer.way for layer in patch.layers}))
    record_property("layers", len(patch.layers))
    fitting = _fitting(eager)
    if fitting is not None:
        batch, expected = fitting
        record_property("inputs", sorted(batch))
        own = _outputs(_built(found, None), batch)
        if max(difference(one, two) for one, two in zip(own, expected, strict=True)) >= CLOSE:
            expected = own  # the unpatched model's implementation differs from its eager one
            record_property("own", True)
        with patch.noise(False):
            ours = _outputs(model, batch)
        assert len(ours) == len(expected)
        worst = max(difference(one, two) for one, two in zip(ours, expected, strict=True))
        record_property("difference", worst)
        assert worst < CLOSE
    patch.remove()
    if fitting is not None:
        assert all(torch.equal(one, two) for one, two in zip(_outputs(model, batch), own, strict=True))
        ga.patch_model(model, HARD)
        assert {(s.module, s.kind) for s in over_tokens(softmaxes(model, fitting[0])) if not s.ours} == set()
