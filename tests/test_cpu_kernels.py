"""The native CPU kernels against the reference, on the same noise: in float32, and against float64."""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gumbel_attention import noise
from gumbel_attention.arguments import attention_problem
from gumbel_attention.impl import cpu, reference
from gumbel_attention.impl.cpu import build
from test_conformance import ARMS, LK, LQ, mask_of

UNAVAILABLE = cpu.available()
COMPILER = build._compiler()
needs_kernels = pytest.mark.skipif(UNAVAILABLE is not None and COMPILER is None, reason=f"{UNAVAILABLE}")
ops = torch.ops.gumbel_attention
MASKS = ["none", "causal", "causal, offset", "padding", "bool", "float", "window"]
KERNEL_ARMS = ["soft", "st", "det-st", "softmax"]
Arguments = dict[str, object]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def solve(**arguments: object) -> Tensor:
    return cpu.attention(attention_problem(**arguments))  # type: ignore[arg-type]


def expected(**arguments: object) -> Tensor:
    return reference.attention(attention_problem(**arguments)).output  # type: ignore[arg-type]


def as_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The arguments with fresh leaves of another dtype."""

    def convert(x: object) -> object:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    return {name: convert(x) for name, x in arguments.items()}


def run(f: Callable[..., Tensor], arguments: Arguments, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output, and the gradients of all leaves."""
    arguments = as_dtype(arguments, dtype)
    out = f(**arguments)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def check(arguments: Arguments) -> None:
    """Errors against float64 of the size of the reference's in float32, relative to the largest entry.

    The noise is within two millionths, which tau divides.
    """
    tau = arguments.get("tau", 1.0)
    floor = 1e-5 + 1e-6 / (tau.detach()[0].item() if isinstance(tau, Tensor) else 1.0)
    exact, same = run(expected, arguments, torch.float64), run(expected, arguments)
    for name, got, bound, want in zip(("output", *arguments), run(solve, arguments), same, exact, strict=False):
        assert got.isfinite().all()
        size = want.abs().max().clamp(min=0.1)  # exact zeros get rounding errors
        error, allowed = ((x - want).abs().max() / size for x in (got, bound))
        assert error <= max(floor, 3 * allowed), (name, error, allowed)


def problem_arguments(mask: str, arm: str, tau: float, **other: object) -> Arguments:
    noisy = ARMS[arm]["noise"] == "gumbel"
    arguments: Arguments = {
        "query": leaf(2, 4, LQ, 8), "key": leaf(2, 2, LK, 8), "value": leaf(2, 2, LK, 5),
        "tau": torch.full((4,), tau, requires_grad=True),
        "noise_scale": torch.tensor([0.8, 1.0, 0.0, 2.0]).requires_grad_() if noisy else 1.0,
        "enable_gqa": True, "seed": 5, **mask_of(mask), **ARMS[arm], **other,
    }  # fmt: skip
    bias = arguments.get("attn_mask")
    if isinstance(bias, Tensor) and bias.dtype == torch.float64:
        arguments["attn_mask"] = bias.detach().float()
    return arguments


@needs_kernels
def test_the_kernels_compile() -> None:
    assert UNAVAILABLE is None


@needs_kernels
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("arm", KERNEL_ARMS)
@pytest.mark.parametrize("tau", [0.01, 0.7, 10.0])
def test_kernels_are_the_reference(mask: str, arm: str, tau: float) -> None:
    check(problem_arguments(mask, arm, tau))


@needs_kernels
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("arm", KERNEL_ARMS)
def test_dropout_seeds_offsets_and_head_shards_at_once(mask: str, arm: str) -> None:
    offsets = {} if mask.startswith("causal") else {"q_offset": 13, "k_offset": 2**31 + 7}
    shard = {"h_offset": 2, "h_total": 9, "seed": torch.tensor([-5, 2**40])}
    check(problem_arguments(mask, arm, 0.7, dropout_p=0.3, **shard, **offsets))


@needs_kernels
@pytest.mark.parametrize("arm", KERNEL_ARMS)
@pytest.mark.parametrize("place", [(1, 1, 0), (1, 700, 9), (200, 2, 300), (130, 1100, 0), (75, 600, 37)])
@pytest.mark.parametrize("causal", [False, True])
def test_ragged_lengths_over_several_blocks(arm: str, place: tuple[int, int, int], causal: bool) -> None:
    q_len, k_len, k_offset = place
    arguments: Arguments = {
        "query": leaf(1, 2, q_len, 7), "key": leaf(1, 1, k_len, 7), "value": leaf(1, 1, k_len, 9), "enable_gqa": True,
        "is_causal": causal, "q_offset": max(0, k_offset + k_len - q_len - 3), "k_offset": k_offset, "seed": 2,
        **ARMS[arm],
    }  # fmt: skip
    check(arguments)


@needs_kernels
@pytest.mark.parametrize("arm", KERNEL_ARMS)
def test_long_masks_of_every_shape(arm: str) -> None:
    full = torch.rand(2, 2, 90, 600) > 0.4
    full[..., 500:590] = False
    q, k, v = leaf(2, 2, 90, 4), leaf(2, 2, 600, 4), leaf(2, 2, 600, 4)
    for keep in (full, full[:, :1], full[:1], full[..., :1, :], full[..., :1], full.transpose(0, 1)):
        bias = torch.randn(keep.shape).masked_fill(~keep, -math.inf)
        for mask in (keep, bias, bias.clamp(min=torch.finfo().min)):
            check({"query": q, "key": k, "value": v, "attn_mask": mask, "is_causal": True, "q_offset": 505, "seed": 3,
                   **ARMS[arm]})  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_float_masks_of_other_dtypes(dtype: torch.dtype) -> None:
    bias = torch.randn(LQ, LK).to(dtype).masked_fill(torch.rand(LQ, LK) > 0.8, torch.finfo(dtype).min)
    q, k, v = torch.randn(2, 2, LQ, 8), torch.randn(2, 2, LK, 8), torch.randn(2, 2, LK, 5)
    arguments: Arguments = {"query": q, "key": k, "value": v, "attn_mask": bias, "seed": 1}
    torch.testing.assert_close(solve(**arguments), expected(**arguments))


@needs_kernels
@pytest.mark.parametrize("seed", [0, -1, 1234567890123456789])
@pytest.mark.parametrize("stream", [noise.STREAM_NOISE, noise.STREAM_DROPOUT])
def test_words_are_the_specification_s(seed: int, stream: int) -> None:
    for place in [(0, 0, 33, 0, 70), (11, 13, 9, 2**32 - 20, 50), (7, 2**31 - 5, 20, 2**40 + 3, 99)]:
        got = ops.cpu_words(seed, *place, stream)
        bh, *rectangle = place
        assert torch.equal(got, noise.word_grid(torch.tensor(seed), torch.tensor(bh), *rectangle, stream))


@needs_kernels
def test_gumbel_values_of_all_sizes_are_within_two_millionths() -> None:
    edges = torch.tensor([0.0, 1 / 32, 1 - 2**-0.5, 1 - math.exp(-1), 0.5, 1.0], dtype=torch.float64) * 2**32
    near = (edges.long()[:, None] + torch.arange(-(2**16), 2**16)).clamp(0, 2**32 - 1).flatten()
    logarithmic = (2 ** torch.linspace(0, 32, 2**18, dtype=torch.float64) - 1).long()
    words = torch.cat([near, logarithmic, 2**32 - 1 - logarithmic, torch.randint(0, 2**32, (2**20,))])
    got, exact = ops.cpu_gumbel(words).double(), noise.gumbel(words)
    assert got.isfinite().all()
    assert ((got - exact).abs() / (1 + exact.abs())).max() < 3e-7
    assert (got - exact).abs().max() < 2e-6


@needs_kernels
@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_choice_is_the_exact_one_wherever_the_gap_exceeds_the_error(tau: float) -> None:
    q, k = torch.randn(4, 4, 256, 16), torch.randn(4, 4, 300, 16)
    index = torch.arange(300.0).expand(4, 4, 300)[..., None]
    got = solve(query=q, key=k, value=index, hard=True, seed=7, tau=tau)[..., 0].long()
    where = noise.Coordinates(torch.tensor(7), 4, 4, 256, 300)
    best = (q.double() @ k.double().mT / 4 + noise.sample("gumbel", where)).topk(2)
    decided = best.values[..., 0] - best.values[..., 1] > 1e-5
    assert (~decided).double().mean() <= 1e-3
    assert torch.equal(got[decided], best.indices[..., 0][decided])


@needs_kernels
@pytest.mark.parametrize("hard", [False, True])
def test_shards_of_positions_and_heads_are_parts_of_the_whole(hard: bool) -> None:
    q, k, v = torch.randn(2, 4, 70, 8), torch.randn(2, 4, 90, 8), torch.randn(2, 4, 90, 8)
    settings: Arguments = {"hard": hard, "seed": 3, "dropout_p": 0.2}
    whole = solve(query=q, key=k, value=v, **settings)
    rows = solve(query=q[:, :, 29:], key=k, value=v, q_offset=29, **settings)
    heads = solve(query=q[:, 1:3], key=k[:, 1:3], value=v[:, 1:3], h_offset=1, h_total=4, **settings)
    keep = torch.arange(90) >= 21
    some = solve(query=q, key=k, value=v, attn_mask=keep, **settings)
    keys = solve(query=q, key=k[:, :, 21:], value=v[:, :, 21:], k_offset=21, **settings)
    torch.testing.assert_close(rows, whole[:, :, 29:])
    torch.testing.assert_close(heads, whole[:, 1:3])
    torch.testing.assert_close(keys, some)


@needs_kernels
@pytest.mark.parametrize("hard", [False, True])
def test_results_do_not_depend_on_threads_or_blocks(hard: bool) -> None:
    arguments: Arguments = {
        "query": leaf(1, 2, 300, 16), "key": leaf(1, 2, 700, 16), "value": leaf(1, 2, 700, 16), "hard": hard,
        "seed": 4, "is_causal": True, "q_offset": 300, "dropout_p": 0.1,
        "tau": torch.full((2,), 0.5, requires_grad=True),
    }  # fmt: skip
    one = run(solve, arguments)
    torch.set_num_threads(2)
    try:
        two = run(solve, arguments)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for block in (16, 48, 128):
        other = run(lambda block=block, **x: cpu.attention(attention_problem(**x), block), arguments)
        for a, b in zip(other, one, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def _nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@needs_kernels
@pytest.mark.usefixtures("_nan_in_fresh_memory")
@pytest.mark.parametrize("arm", KERNEL_ARMS)
def test_every_output_is_written(arm: str) -> None:
    assert torch.empty(3).isnan().all()
    for q_len, k_len, k_offset in [(37, 21, 10), (5, 9, 100)]:
        arguments: Arguments = {
            "query": leaf(2, 2, q_len, 3), "key": leaf(2, 2, k_len, 3), "value": leaf(2, 2, k_len, 3), "seed": 1,
            "is_causal": True, "k_offset": k_offset, **ARMS[arm],
        }  # fmt: skip
        results = run(solve, arguments)
        assert all(x.isfinite().all() for x in results)
        assert not results[0][:, :, :k_offset].any()


@needs_kernels
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_padding_never_reaches_an_output_or_gradient(hard: bool, causal: bool, bad: float) -> None:
    keep = mask_of("padding")["attn_mask"]
    assert isinstance(keep, Tensor)
    k, v = (torch.randn(2, 2, LK, 8).masked_fill(~keep.mT, bad).requires_grad_() for _ in range(2))
    for mask in (keep, torch.where(keep, 0.0, -math.inf)):
        arguments: Arguments = {
            "query": leaf(2, 4, LQ, 8), "key": k, "value": v, "attn_mask": mask, "enable_gqa": True, "hard": hard,
            "seed": 1, "is_causal": causal, "q_offset": 3, "tau": torch.ones(1, requires_grad=True),
        }  # fmt: skip
        assert all(x.isfinite().all() for x in run(solve, arguments))


@needs_kernels
def test_keys_after_the_last_query_are_not_read() -> None:
    q, k, v = leaf(1, 1, 20, 4), torch.randn(1, 1, 40, 4), torch.randn(1, 1, 40, 4)
    k[:, :, 20:] = v[:, :, 20:] = math.nan
    for hard in (False, True):
        arguments: Arguments = {"query": q, "key": k.requires_grad_(), "value": v.requires_grad_(), "is_causal": True,
                                "hard": hard}  # fmt: skip
        assert all(x.isfinite().all() for x in run(solve, arguments))


@needs_kernels
def test_tensors_as_transposition_slicing_and_expansion_leave_them() -> None:
    q = torch.randn(2, 40, 3, 8).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 3, 8, 50).mT.requires_grad_()
    v = torch.randn(1, 1, 50, 16)[..., ::2].expand(2, 3, 50, 8)
    for hard in (False, True):
        settings: Arguments = {"hard": hard, "seed": 1}
        got, want = (f(query=q, key=k, value=v, **settings) for f in (solve, expected))
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k)) for x in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_loading_leaves_denormals_and_infinities_as_they_are() -> None:
    solve(query=torch.randn(1, 1, 4, 4), key=torch.randn(1, 1, 4, 4), value=torch.randn(1, 1, 4, 4))
    assert float(torch.full((), 1e-40) * 0.5) > 0.0
    assert sys.float_info.min / 4 > 0.0


def operator_arguments(hard: bool, grad: bool = True) -> tuple[object, ...]:
    q, k, v = (torch.randn(1, 2, 20, 4, requires_grad=grad) for _ in range(3))
    tau, scale = (torch.ones(2, requires_grad=grad) for _ in range(2))
    keep = torch.rand(20, 20)[None, None] > 0.2
    return q, k, v, tau, scale, torch.tensor(3), keep, None, 0.5, True, 0, 0, hard, True, 0.1, 0, 2, 64


@needs_kernels
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("hard", [False, True])
def test_operators_pass_opcheck(hard: bool) -> None:
    torch.library.opcheck(ops.cpu_forward.default, operator_arguments(hard))
    arguments = operator_arguments(hard, grad=False)
    outputs = ops.cpu_forward(*arguments)
    torch.library.opcheck(ops.cpu_backward.default, (torch.randn_like(outputs[0]), *outputs, True, *arguments))


@needs_kernels
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("hard", [False, True])
def test_checkpoint_and_compile(hard: bool) -> None:
    x = torch.randn(1, 2, 20, 4, requires_grad=True)
    tau = torch.full((2,), 0.5, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return solve(query=x, key=x, value=x, hard=hard, tau=tau, is_causal=True, dropout_p=0.1).square().sum()

    results = []
    for f in (
        loss,
        lambda x: torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False),
        torch.compile(loss, backend="aot_eager", fullgraph=True),
    ):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(f(x), (x, tau)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@needs_kernels
def test_second_derivatives_and_vmap_are_refused() -> None:
    x = leaf(1, 1, 5, 4)
    gradient = torch.autograd.grad(solve(query=x, key=x, value=x).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(gradient.sum(), x)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda q: solve(query=q, key=x, value=x, seed=1))(torch.randn(3, 1, 1, 5, 4))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": torch.randn(1, 1, 4, 4).double(), "key": torch.randn(1, 1, 4, 4).double(),
          "value": torch.randn(1, 1, 4, 4).double()}, "float32"),
        ({"noise": "normal"}, "normal"), ({"softcap": 2.0}, "softcap"), ({"sinks": torch.zeros(1)}, "sinks"),
        ({"q_offset": torch.tensor([3])}, "q_offset"), ({"attn_mask": torch.zeros(4, 4, requires_grad=True)}, "mask"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(change: Arguments, reason: str) -> None:
    arguments = {name: torch.randn(1, 1, 4, 4) for name in ("query", "key", "value")} | change
    with pytest.raises(NotImplementedError, match=f"{reason}.*blockwise"):
        solve(**arguments)


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("hard", [False, True])
def test_memory_is_linear(hard: bool) -> None:
    n = 8192
    q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    solve(query=q, key=k, value=v, hard=hard, is_causal=True).sum().backward()
    assert peak() - before < 4 * n * n / 4
