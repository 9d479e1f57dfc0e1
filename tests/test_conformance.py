"""Every implementation against the reference, on the same noise, in float64: outputs and all gradients."""

import functools
import math

import pytest
import torch
from torch import Tensor

import gumbel_attention as ga
from gumbel_attention.arguments import attention_problem
from gumbel_attention.impl import blockwise, reference, sdpa

ARMS = {
    "soft": {"noise": "gumbel"},
    "st": {"noise": "gumbel", "hard": True},
    "det-st": {"noise": "none", "hard": True},
    "softmax": {"noise": "none"},
    "normal-st": {"noise": "normal", "hard": True},
}
LQ, LK = 21, 27


def mask_of(kind: str) -> dict[str, object]:
    """Mask arguments, with rows that see nothing where the kind allows it."""
    if kind == "padding":
        keep = torch.ones(2, 1, 1, LK, dtype=torch.bool)
        keep[0, ..., 19:] = keep[1, ..., :5] = False
        return {"attn_mask": keep}
    if kind == "bool":
        keep = torch.rand(2, 4, LQ, LK) > 0.5
        keep[0, 1, 3] = keep[1, :, 20] = False
        return {"attn_mask": keep}
    if kind == "float":
        bias = torch.randn(4, LQ, LK, dtype=torch.float64).masked_fill(torch.rand(LQ, LK) > 0.8, -math.inf)
        bias[:, 7] = -math.inf
        return {"attn_mask": bias.requires_grad_()}
    if kind == "window":
        distance = torch.arange(LQ)[:, None] - torch.arange(LK)
        return {"attn_mask": (distance >= 0) & (distance < 5)}
    return {"is_causal": kind.startswith("causal"), "q_offset": 4 if kind == "causal, offset" else 0}


def run(implementation: object, arguments: dict[str, object], grads: list[Tensor], d_out: Tensor) -> list[Tensor]:
    output = implementation(attention_problem(**arguments))  # type: ignore[operator,arg-type]
    return [output, *torch.autograd.grad(output, grads, d_out, allow_unused=True)]


def compare(arguments: dict[str, object], implementation: object, tolerance: float = 1e-10) -> None:
    tensors = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    q, v = arguments["query"], arguments["value"]
    assert isinstance(q, Tensor)
    assert isinstance(v, Tensor)
    d_out = torch.randn(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    want = run(lambda problem: reference.attention(problem).output, arguments, tensors, d_out)
    got = run(implementation, arguments, tensors, d_out)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("mask", ["none", "causal", "causal, offset", "padding", "bool", "float", "window"])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("tau", [0.01, 0.7, 10.0])
def test_blockwise_is_the_reference(mask: str, arm: str, tau: float) -> None:
    compare(
        {"query": leaf(2, 4, LQ, 8), "key": leaf(2, 2, LK, 8), "value": leaf(2, 2, LK, 5), "enable_gqa": True,
         "tau": torch.full((4,), tau, dtype=torch.float64, requires_grad=True), "seed": 5,
         **mask_of(mask), **ARMS[arm]},
        functools.partial(blockwise.attention, block_scores=2 * 4 * LK * 8),
    )  # fmt: skip


@pytest.mark.parametrize("mask", ["none", "causal", "causal, offset", "padding", "bool", "float", "window"])
@pytest.mark.parametrize("tau", [0.01, 0.7, 10.0])
def test_sdpa_is_the_reference_without_noise(mask: str, tau: float) -> None:
    compare(
        {"query": leaf(2, 4, LQ, 8), "key": leaf(2, 2, LK, 8), "value": leaf(2, 2, LK, 5), "enable_gqa": True,
         "tau": torch.full((4,), tau, dtype=torch.float64, requires_grad=True), "noise": "none", **mask_of(mask)},
        sdpa.attention,
    )  # fmt: skip


def test_sdpa_with_offsets_of_each_example() -> None:
    compare(
        {"query": leaf(2, 4, LQ, 8), "key": leaf(2, 4, LK, 8), "value": leaf(2, 4, LK, 5), "noise": "none",
         "is_causal": True, "q_offset": 7, "k_offset": torch.tensor([0, 3])},
        sdpa.attention,
    )  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_blockwise_with_everything_at_once(arm: str) -> None:
    noise_scale = torch.full((4,), 0.8, dtype=torch.float64, requires_grad=ARMS[arm]["noise"] != "none")
    compare(
        {"query": leaf(2, 4, LQ, 8), "key": leaf(2, 4, LK, 8), "value": leaf(2, 4, LK, 5), "softcap": 1.5,
         "tau": leaf(4).detach().exp().requires_grad_(), "noise_scale": noise_scale, "sinks": leaf(4),
         "dropout_p": 0.3,
         "seed": torch.tensor([5, 9]), "is_causal": True, "q_offset": torch.tensor([6, 2]), **mask_of("float"),
         **ARMS[arm]},
        functools.partial(blockwise.attention, block_scores=2 * 4 * LK * 5),
    )  # fmt: skip


@pytest.mark.parametrize("block_scores", [1, 8 * LK, 8 * LK * 7, 10**9])
def test_results_do_not_depend_on_the_block_size(block_scores: int) -> None:
    q, k, v = torch.randn(2, 4, LQ, 8), torch.randn(2, 4, LK, 8), torch.randn(2, 4, LK, 5)
    problem = attention_problem(q, k, v, hard=True, seed=3)
    assert torch.equal(blockwise.attention(problem, block_scores), reference.attention(problem).output)


@pytest.mark.parametrize("hard", [False, True])
def test_nan_in_padding_never_reaches_an_output_or_gradient(hard: bool) -> None:
    q, k, v = leaf(2, 2, LQ, 8), torch.randn(2, 2, LK, 8).double(), torch.randn(2, 2, LK, 5).double()
    keep = mask_of("padding")["attn_mask"]
    assert isinstance(keep, Tensor)
    k, v = (x.masked_fill(~keep.mT, math.nan).requires_grad_() for x in (k, v))
    out = ga.gumbel_attention(q, k, v, keep, hard=hard, impl="blockwise")
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hard", [False, True])
def test_low_precision_errs_no_more_than_the_reference(dtype: torch.dtype, hard: bool) -> None:
    """At most twice the reference's error in the same dtype against float64, over rows whose choice agrees."""
    q, k, v = (torch.randn(2, 4, 64, 16, dtype=dtype) for _ in range(3))
    exact = ga.gumbel_attention_with_info(q.double(), k.double(), v.double(), hard=hard, seed=1)
    ours = ga.gumbel_attention(q, k, v, hard=hard, seed=1, impl="blockwise").double()
    same = ga.gumbel_attention_with_info(q, k, v, hard=hard, seed=1)
    rows = torch.ones(2, 4, 64, dtype=torch.bool) if not hard else same.indices == exact.indices
    assert rows.float().mean() >= 0.999
    error, bound = ((x - exact.output)[rows].abs().max() for x in (ours, same.output.double()))
    assert error <= 2 * bound


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
def test_blockwise_under_checkpoint_and_compile() -> None:
    x = torch.randn(1, 2, 20, 4, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return ga.gumbel_attention(x, x, x, hard=True, tau=0.5, impl="blockwise").square().sum()

    results = []
    for f in (
        loss,
        lambda x: torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False),
        torch.compile(loss, backend="aot_eager", fullgraph=True),
    ):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(f(x), x)[0])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_no_tensor_of_all_scores_is_made() -> None:
    """Peak of live tensor memory under a causal mask: far below one (Lq, Lk) tensor of the scores' dtype."""
    n = 4096
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        ga.gumbel_attention(q, k, v, is_causal=True, impl="blockwise").sum().backward()
    assert 0 < largest <= 2**20 < n * n


def test_weights_are_refused() -> None:
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"it holds no weights.*reference"):
        ga.gumbel_attention_with_info(q, q, q, impl="blockwise")
    x = q.clone().requires_grad_()
    total = ga.gumbel_attention(x, x, x, impl="blockwise").sum()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(total, x, create_graph=True)
