"""Which classes dispatch and which compute a softmax of their own, told by their source."""

import importlib
import importlib.util

import pytest
import torch
from torch import Tensor, nn

from gumbel_attention.integrations.inspection import (
    NO_SOFTMAX,
    architecture,
    dispatches,
    way_in,
    why_not,
)

ALL_ATTENTION_FUNCTIONS: dict[str, object] = {}


class Dispatching(nn.Module):
    def forward(self, x: Tensor) -> object:
        return ALL_ATTENTION_FUNCTIONS["sdpa"]


class Inheriting(Dispatching):
    def extra(self) -> int:
        return 1


class OwnSoftmaxAttention(Dispatching):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, dim=-1)


class Pooling(nn.MultiheadAttention):
    pass


class Router(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, dim=-1)


def test_the_class_that_computes_decides() -> None:
    assert [dispatches(cls) for cls in (Dispatching, Inheriting, OwnSoftmaxAttention, nn.Linear)] == [
        True,
        True,
        False,
        False,
    ]


def test_a_class_without_source_does_neither() -> None:
    unreadable = type("NotebookAttention", (nn.Module,), {"forward": lambda self, x: x})
    assert not dispatches(unreadable)
    assert way_in(unreadable) is None


def weigh(q: Tensor, k: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT, dim=-1)
    return weights @ k


class Mixer(nn.Module):
    """Attention by another name, with its softmax outside the class."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return weigh(q, k)


class OwnSoftmaxOfDispatching(Dispatching):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:  # type: ignore[override]  # never called
        return torch.softmax(q @ k.mT, dim=-1) @ k


class Either(Dispatching):
    def upcast(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, dim=-1) @ k


class GatedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.gate(x), dim=-1) * x


def test_the_way_in() -> None:
    ways = {
        Dispatching: "registry",
        Inheriting: "registry",
        Mixer: "rewrite",
        OwnSoftmaxOfDispatching: "rewrite",
        Either: "both",
        GatedAttention: None,
        Pooling: None,
        Router: None,
        nn.Linear: None,
    }
    assert {cls: way_in(cls) for cls in ways} == ways


def test_why_there_is_no_way_in() -> None:
    assert "not taken over scores of queries and keys" in (why_not(GatedAttention) or "")
    assert "GumbelMultiheadAttention" in (why_not(Pooling) or "")
    assert [why_not(cls) for cls in (Mixer, Dispatching, Router, nn.Linear)] == [None] * 4


REAL = {
    "bert.BertSelfAttention": "registry",
    "gpt2.GPT2Attention": "both",  # with reorder_and_upcast_attn it computes its own
    "bloom.BloomAttention": "rewrite",
    "xlm.MultiHeadAttention": "rewrite",
    "inkling2.Inkling2BlockAttentionResidual": None,
    "sam2.Sam2MultiScaleAttention": "registry",  # beside a softmax whose result nobody reads
    "sam.SamVisionSdpaAttention": "rewrite",
    "doge.DogeCDMoE": None,
    "deformable_detr.DeformableDetrMultiscaleDeformableAttention": None,
    "siglip.SiglipMultiheadAttentionPoolingHead": None,
    "ibert.IBertSelfAttention": None,
    "yoso.YosoSelfAttention": None,
}


@pytest.mark.parametrize(("name", "way"), REAL.items())
def test_classes_of_transformers(name: str, way: str | None) -> None:
    package, cls_name = name.split(".")
    if importlib.util.find_spec(f"transformers.models.{package}") is None:
        pytest.skip(f"this version of transformers has no {package}")
    cls = getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), cls_name)
    assert way_in(cls) == way
    assert architecture(cls) == package


@pytest.mark.parametrize("package", NO_SOFTMAX)
def test_nothing_of_these_architectures_is_reached(package: str) -> None:
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    modules = [cls for cls in classes if issubclass(cls, nn.Module)]
    assert modules
    assert {way_in(cls) for cls in modules} == {None}
    named_so = [cls for cls in modules if "SelfAttention" in cls.__name__]
    assert {why_not(cls) for cls in named_so} <= {NO_SOFTMAX[package]}
