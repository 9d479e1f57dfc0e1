"""Every way to write an attention softmax: replaced, compiled, undone; and what is left alone or refused."""

from __future__ import annotations

import functools
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gumbel_attention.integrations import rewriting
from gumbel_attention.integrations.rewritten_softmax import SoftmaxState
from models import HARD, PLAIN


class Written(nn.Module):
    """Queries and keys of one head each row; the softmax is what the subclasses write."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        raise NotImplementedError


class Functional(Written):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return F.softmax(input=q @ k.mT, dim=-1) @ k


class OfTorch(Written):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax(torch.matmul(q, k.mT), -1, dtype=torch.float64).to(q.dtype).matmul(k)


class OfTensor(Written):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.mT
        scores *= 1.0
        weights = scores.softmax(-1)
        return torch.einsum("...qk,...kd->...qd", weights, k)


class Constructed(Written):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return nn.Softmax(dim=-1)(q @ k.mT) @ k


class Submodule(Written):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.softmax(q @ k.mT) @ k


class Whole(Written):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, scale=1.0)


def stable_softmax(scores: Tensor, dim: int) -> Tensor:
    return torch.softmax(scores - scores.amax(dim, keepdim=True), dim=dim)


def twice_removed(scores: Tensor) -> Tensor:
    return stable_softmax(scores, dim=-1)


def attend_outside(q: Tensor, k: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT, dim=-1)
    return weights @ k


class Helper(Written):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return twice_removed(q @ k.mT) @ k


class HelperThatAttends(Written):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return attend_outside(q, k)


class OwnMethodAttention(Written):
    def weigh(self, scores: Tensor) -> Tensor:
        return nn.Softmax(dim=-1)(scores)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.weigh(q @ k.mT) @ k


class Static(Written):
    @staticmethod
    def attend(q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, dim=-1) @ k

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.attend(q, k)


class Inherited(Functional):
    pass


class CallsSuper(Functional):
    def forward(self, q: Tensor, k: Tensor, *, own: bool = False) -> Tensor:
        if own:
            return torch.softmax(q @ k.mT, dim=-1) @ k
        return super().forward(q, k)


class OnlyCallsSuper(CallsSuper):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:  # type: ignore[override]  # as models do
        return super().forward(q, k, own=False)


def logged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        CALLS.append(function.__name__)
        return function(*args, **kwargs)

    return wrapper


CALLS: list[str] = []


class Decorated(Written):
    @torch.no_grad()
    @logged
    def forward(self, q: Tensor, k: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return torch.softmax(q @ k.mT * scale + shift, dim=-1) @ k


def closing_over(factor: float) -> type[Written]:
    class Closure(Written):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            assert super().num_heads == 2
            return torch.softmax(q @ k.mT * factor, dim=-1) @ k

    return Closure


class Private(Written):
    def __init__(self) -> None:
        super().__init__()
        self.__factor = 1.0

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * self.__factor, dim=-1) @ k


FORMS = [
    Functional,
    OfTorch,
    OfTensor,
    Constructed,
    Submodule,
    Whole,
    Helper,
    HelperThatAttends,
    OwnMethodAttention,
    Static,
    Inherited,
    CallsSuper,
    OnlyCallsSuper,
    Decorated,
    closing_over(1.0),
    Private,
]


def heads(seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(3, 2, n, 4, generator=generator) for n in (5, 6))
    return q, k


@pytest.mark.parametrize("cls", FORMS, ids=lambda cls: cls.__name__)
def test_every_form_of_the_call_is_replaced(cls: type[Written]) -> None:
    module, (q, k) = cls(), heads()
    assert rewriting.softmax_calls(cls)
    plain = torch.softmax(q @ k.mT, dim=-1) @ k
    hard = F.one_hot((q @ k.mT).argmax(-1), 6).float() @ k
    torch.testing.assert_close(module(q, k), plain)
    state = SoftmaxState(HARD, 2, module)
    state.enter(module)
    assert isinstance(module, cls)
    assert (type(module).__name__, type(module).__module__) == (cls.__name__, cls.__module__)
    torch.testing.assert_close(module(q, k), hard)
    state.leave(module)
    assert type(module) is cls
    torch.testing.assert_close(module(q, k), plain)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # raised by torch's compiler against itself
@pytest.mark.parametrize("cls", [c for c in FORMS if c is not Decorated], ids=lambda cls: cls.__name__)
def test_every_form_compiles_to_one_graph(cls: type[Written]) -> None:
    module, (q, k) = cls(), heads()
    state = SoftmaxState(HARD, 2, module)
    state.enter(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), module(q, k))


def test_decorators_and_defaults_stay() -> None:
    module, (q, k) = Decorated(), heads()
    SoftmaxState(HARD, 2, module).enter(module)
    CALLS.clear()
    assert not module(q.requires_grad_(), k, shift=1.0).requires_grad
    assert CALLS == ["forward"]


def test_a_traceback_points_into_the_original_file() -> None:
    module, (q, k) = Functional(), heads()
    SoftmaxState(PLAIN, 2, module).enter(module)
    with pytest.raises(RuntimeError) as caught:
        module(q, k[..., :2])
    lines = [frame for frame in traceback.extract_tb(caught.tb) if frame.name == "forward"]
    assert lines[-1].filename == __file__
    assert lines[-1].line == "return F.softmax(input=q @ k.mT, dim=-1) @ k"


def test_methods_bound_on_the_instance_follow() -> None:
    module, (q, k) = Functional(), heads()
    module.kept = module.forward  # as Accelerate's hooks keep it
    state = SoftmaxState(HARD, 2, module)
    state.enter(module)
    assert torch.equal(module.kept(q, k), module(q, k))
    state.leave(module)
    assert torch.equal(module.kept(q, k), module(q, k))


def test_a_module_pickles_by_its_original_class() -> None:
    module, (q, k) = Functional(), heads()
    SoftmaxState(HARD, 2, module).enter(module)
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is rewriting.rewritten(Functional) is type(module)
    assert torch.equal(again(q, k), module(q, k))


class LearnedKernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.gate(x), dim=-1) @ x


class OtherDimension(Written):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, dim=1) @ k


class OnlyScores(Written):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT, dim=-1)
        return weights.amax(-1)


@pytest.mark.parametrize("cls", [LearnedKernel, OtherDimension, OnlyScores, nn.MultiheadAttention, nn.Linear])
def test_other_softmaxes_stay(cls: type[nn.Module]) -> None:
    assert rewriting.softmax_calls(cls) == []
    with pytest.raises(ValueError, match="no attention softmax"):
        rewriting.rewritten(cls)


class CallsStaticByClass(Static):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return CallsStaticByClass.attend(q, k)


class ByClassMethod(Written):
    @classmethod
    def attend(cls, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, dim=-1) @ k


class ThirdPositional(Written):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, -1, torch.float32) @ k


class SuperWithArguments(Functional):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return super(SuperWithArguments, self).forward(q, k)  # noqa: UP008  # the form under test


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (CallsStaticByClass, "static method"),
        (ByClassMethod, "class method"),
        (ThirdPositional, "positional arguments"),
        (SuperWithArguments, "write super"),
    ],
)
def test_what_cannot_be_replaced_is_refused(cls: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewriting.rewritten(cls)
