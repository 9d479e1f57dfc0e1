"""NaN that a query sees reaches its output: it takes part, wins a hard choice, and is never taken for masked."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gumbel_attention as ga
from conformance import CUDA, NAMES, Arguments, attend, skip_if_unable, thinned
from gumbel_attention.integrations.rewritten_softmax import SoftmaxState
from interpreter import INTERPRETER_WARNINGS, INTERPRETING

pytestmark = [*INTERPRETER_WARNINGS, pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")]
NAN = math.nan
PAYLOAD = torch.tensor([-0x55AB], dtype=torch.int32).view(torch.float32)
"""A negative NaN with bits set below the quiet one."""
HARD_TRITON = "the forward kernel compares with `>`, which costs two instructions a score less than to keep NaN"


def arms() -> Iterator[object]:
    """Every implementation, soft and hard, with and without noise."""
    for name in NAMES:
        for hard in (False, True):
            for noise in ("none", "gumbel"):
                marks = [pytest.mark.xfail(strict=True, reason=HARD_TRITON)] if name == "triton" and hard else []
                yield pytest.param(name, hard, noise, marks=marks, id=f"{name}-{'hard' if hard else 'soft'}-{noise}")


def inputs(name: str, **more: object) -> Arguments:
    """Two blocks of keys (not under the interpreter), grouped heads, NaN in padding, and a row that sees nothing."""
    q_len, k_len = (21, 37) if thinned(name) else (70, 600)
    keep = torch.ones(q_len, k_len, dtype=torch.bool)
    keep[:, 3] = keep[: q_len // 2, 9] = keep[4] = False
    key = torch.randn(1, 1, k_len, 16)
    key[:, :, 3] = NAN
    query, value = torch.randn(1, 2, q_len, 16), torch.randn(1, 1, k_len, 16)
    arguments: Arguments = {
        "query": query, "key": key, "value": value, "attn_mask": keep, "enable_gqa": True, "seed": 3, **more,
    }  # fmt: skip
    skip_if_unable(name, arguments)
    return arguments


def check(name: str, arguments: Arguments, rows: int) -> None:
    """The output is the reference's, which in soft attention is NaN in ``rows`` rows of both heads together."""
    want = attend("reference", arguments)
    if not arguments["hard"]:
        assert want.isnan().all(-1).sum() == want.isnan().any(-1).sum() == rows
    got = attend(name, arguments)
    if name == "sdpa":  # torch adds its mask: NaN in a key that others see also reaches rows it is hidden from
        want = want.masked_fill(got.isnan(), NAN)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(("name", "hard", "noise"), list(arms()))
@pytest.mark.parametrize("place", ["query", "key", "keys"])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_in_a_visible_query_or_key(name: str, hard: bool, noise: str, place: str, masked: bool) -> None:
    arguments = inputs(name, hard=hard, noise=noise)
    query, key = arguments["query"], arguments["key"]
    assert isinstance(query, Tensor)
    assert isinstance(key, Tensor)
    keep = arguments["attn_mask"]
    assert isinstance(keep, Tensor)
    if not masked:
        key[:, :, 3] = 0.0
        keep = torch.ones_like(keep)
        del arguments["attn_mask"]
    if place == "query":
        query[:, 0, -2, 5], query[:, 1, -1] = NAN, PAYLOAD
        check(name, arguments, 2)
        return
    bad = [9] if place == "key" else [9, 15, key.shape[-2] - 2]  # the first that a query sees wins a hard choice
    for j in bad:
        key[:, :, j, 7] = PAYLOAD
    check(name, arguments, 2 * int(keep[:, bad].any(-1).sum()))


@pytest.mark.parametrize(("name", "hard", "noise"), list(arms()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_in_a_float_mask(name: str, hard: bool, noise: str, dtype: torch.dtype) -> None:
    """One in a row that sees other keys, one in a row that sees nothing else, over a key that nothing else sees."""
    arguments = inputs(name, hard=hard, noise=noise)
    keep = arguments["attn_mask"]
    assert isinstance(keep, Tensor)
    bias = torch.randn(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)
    bias[15, 6] = bias[4, 9] = bias[17, 12] = NAN
    bias[:, 12] = bias[:, 12].masked_fill(~bias[:, 12].isnan(), -math.inf)
    check(name, arguments | {"attn_mask": bias}, 2 * 3)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("sdpa", "triton")])
@pytest.mark.parametrize("hard", [False, True])
def test_a_gradient_through_nan_is_nan(name: str, hard: bool) -> None:
    """And so it is seen where gradients are watched."""
    tau = torch.ones(2, requires_grad=True)
    arguments = inputs(name, hard=hard, tau=tau)
    query, key = arguments["query"], arguments["key"]
    assert isinstance(query, Tensor)
    assert isinstance(key, Tensor)
    query, key = query.clone().requires_grad_(), key.clone().requires_grad_()
    with torch.no_grad():
        query[:, :, 6] = NAN
    attend(name, arguments | {"query": query, "key": key}).sum().backward()
    assert query.grad is not None
    assert key.grad is not None
    assert tau.grad is not None
    assert query.grad[:, :, 6].isnan().all()
    assert query.grad.isnan().any(-1).sum() == 2
    assert key.grad[:, :, 20].isnan().all()
    assert tau.grad.isnan().all()


def test_the_mask_is_torchs() -> None:
    q, k, v = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    bias = torch.randn(6, 9)
    bias[2, 5] = NAN
    want = F.scaled_dot_product_attention(q, k, v, bias)
    assert want[:, :, 2].isnan().all()
    torch.testing.assert_close(ga.gumbel_attention(q, k, v, bias, noise="none"), want, equal_nan=True)
    hard = ga.gumbel_attention_with_info(q, k, v, bias, hard=True)
    assert hard.indices is not None
    assert (hard.indices[:, :, 2] == 5).all()


@pytest.mark.parametrize("place", ["logits", "mask"])
def test_gumbel_softmax(place: str) -> None:
    logits, mask = torch.tensor([[NAN, 0.0, 1.0], [0.0, 1.0, 2.0]]), None
    assert F.gumbel_softmax(logits)[0].isnan().all()
    if place == "mask":
        logits, mask = torch.zeros(2, 3), logits
    soft = ga.gumbel_softmax(logits, mask=mask)
    assert soft[0].isnan().all()
    assert soft[1].isfinite().all()
    assert ga.gumbel_softmax(logits, hard=True, mask=mask)[0].tolist() == [1.0, 0.0, 0.0]
    masked = ga.gumbel_softmax(
        logits, mask=torch.tensor([False, True, True]) if mask is None else mask.nan_to_num(-math.inf)
    )
    assert masked.isfinite().all()


def test_rewritten_attention() -> None:
    class Attends(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return torch.softmax(q @ k.mT, dim=-1) @ k

    state = SoftmaxState(ga.GumbelAttentionConfig(noise="none"), 1, Attends())
    scores = torch.tensor([[NAN, 0.0, -math.inf], [0.0, -math.inf, 1.0]])
    weights = state.softmax(scores, dim=-1)
    assert weights[0, :2].isnan().all()
    torch.testing.assert_close(weights[1], scores[1].softmax(-1))


@pytest.mark.skipif(INTERPRETING or CUDA, reason="for machines that can compile the Triton kernels, but not run them")
@pytest.mark.parametrize("name", ["forward", "rows", "columns"])
def test_the_triton_kernels_keep_nan_of_a_mask(name: str) -> None:
    """What the interpreter cannot tell: its maximum of NaN and a number is NaN in any case."""
    pytest.importorskip("triton", reason="triton is not installed")
    from test_triton_compiled import compiled, kernel_arguments

    kernel, values, tile = kernel_arguments(name, {"hard": False, "attn_mask": torch.zeros(4096, 4096)})
    assert "FMNMX.NAN" in compiled(kernel, values, tile).asm["sass"]
