"""Which classes dispatch and which compute a softmax of their own, told by their source."""

import torch
from torch import Tensor, nn

from gumbel_attention.integrations.inspection import computes_own_softmax, dispatches

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
    assert [computes_own_softmax(cls) for cls in (Dispatching, Inheriting, OwnSoftmaxAttention, Pooling, Router)] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_a_class_without_source_does_neither() -> None:
    unreadable = type("NotebookAttention", (nn.Module,), {"forward": lambda self, x: x})
    assert not dispatches(unreadable)
    assert not computes_own_softmax(unreadable)
