"""What every implementation promises beyond its values: memory written, padding unread, refusals, independence."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import gumbel_attention as ga
from conformance import (
    ARMS,
    CUDA,
    NAMES,
    Arguments,
    attend,
    chosen_keys,
    device_of,
    leaf,
    mask_of,
    moved,
    results,
    sizes_of,
    skip_if_unable,
)
from gumbel_attention import noise
from gumbel_attention.arguments import attention_problem
from gumbel_attention.impl import blockwise, cpu, reference
from interpreter import INTERPRETER_WARNINGS, INTERPRETING

pytestmark = INTERPRETER_WARNINGS
every = pytest.mark.parametrize("name", NAMES)
KERNEL_ARMS = ("soft", "st", "det-st", "softmax")


def inputs(name: str, **more: object) -> Arguments:
    """Leaves of the implementation's sizes; no noise where it has none."""
    batch, heads, kv_heads, q_len, k_len, d, d_v = sizes_of(name)
    arguments: Arguments = {
        "query": leaf(batch, heads, q_len, d), "key": leaf(batch, kv_heads, k_len, d),
        "value": leaf(batch, kv_heads, k_len, d_v), "enable_gqa": True, "seed": 1,
        "tau": torch.ones(heads, requires_grad=True), **({"noise": "none"} if name == "sdpa" else {}), **more,
    }  # fmt: skip
    skip_if_unable(name, arguments)
    return arguments


@pytest.fixture
def _nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_nan_in_fresh_memory")
@pytest.mark.parametrize("arm", KERNEL_ARMS)
@every
def test_every_output_is_written(name: str, arm: str) -> None:
    """Also rows before the first key, and keys that no query sees."""
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, device=device_of(name)).isnan().all()
    for q_len, k_len, k_offset in [(37, 21, 10), (5, 9, 100)]:
        arguments: Arguments = {
            "query": leaf(1, 2, q_len, 3), "key": leaf(1, 2, k_len, 3), "value": leaf(1, 2, k_len, 3), "seed": 1,
            "is_causal": True, "k_offset": k_offset, "tau": torch.ones(2, requires_grad=True), **ARMS[arm],
        }  # fmt: skip
        skip_if_unable(name, arguments)
        got = results(name, arguments)
        assert all(x.isfinite().all() for x in got.values())
        assert not got["output"][:, :, :k_offset].any()
        assert not got["value"][:, :, max(0, q_len - k_offset) :].any()


@every
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_padding_never_reaches_an_output_or_gradient(name: str, hard: bool, causal: bool, bad: float) -> None:
    sizes = sizes_of(name)
    keep = mask_of("padding", sizes)["attn_mask"]
    assert isinstance(keep, Tensor)
    for mask in (keep, torch.where(keep, 0.0, -math.inf)):
        arguments = inputs(name, attn_mask=mask, hard=hard, is_causal=causal, q_offset=3)
        for tensor in ("key", "value"):
            x = arguments[tensor]
            assert isinstance(x, Tensor)
            arguments[tensor] = x.detach().masked_fill(~keep.mT, bad).requires_grad_()
        assert all(x.isfinite().all() for x in results(name, arguments).values())
        if INTERPRETING and bad == math.inf:
            break


@every
@pytest.mark.parametrize("hard", [False, True])
def test_a_row_that_sees_nothing_gives_zero(name: str, hard: bool) -> None:
    sizes = sizes_of(name)
    keep = torch.zeros(sizes.batch, 1, sizes.q_len, sizes.k_len, dtype=torch.bool)
    arguments = inputs(name, attn_mask=keep, hard=hard, tau=torch.full((sizes.heads,), 0.01, requires_grad=True))
    assert all((x == 0.0).all() for x in results(name, arguments).values())


@every
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("place", [{}, {"q_offset": 5}, {"q_offset": torch.tensor([5, 2])}], ids=["0", "5", "each"])
@pytest.mark.parametrize("mask", ["none", "row", "empty"])
def test_no_queries_under_a_causal_mask(
    name: str, hard: bool, place: Arguments, mask: str, capfd: pytest.CaptureFixture[str]
) -> None:
    k_len, d_v = 9, 3
    keep = None if mask == "none" else torch.ones(1 if mask == "row" else 0, k_len, dtype=torch.bool)
    arguments: Arguments = {
        "query": leaf(2, 4, 0, 8), "key": leaf(2, 2, k_len, 8), "value": leaf(2, 2, k_len, d_v), "enable_gqa": True,
        "is_causal": True, "attn_mask": keep, "hard": hard, "noise": "none", **place,
    }  # fmt: skip
    skip_if_unable(name, arguments)
    got = results(name, arguments)
    assert got["output"].shape == (2, 4, 0, d_v)
    assert got["query"].shape == (2, 4, 0, 8)
    assert not got["key"].any()
    assert not got["value"].any()
    attend(name, arguments).sum().backward()  # an expanded gradient, whose rows lie 0 apart
    assert "ERROR" not in "".join(capfd.readouterr()), "BLAS refuses such rows"
    auto = ga.gumbel_attention(**arguments)  # type: ignore[arg-type]  # the values of Arguments are objects
    assert auto.shape == (2, 4, 0, d_v)


@every
@pytest.mark.parametrize("hard", [False, True])
def test_keys_after_the_last_query_are_not_read(name: str, hard: bool) -> None:
    arguments = inputs(name, is_causal=True, hard=hard)
    for tensor in ("key", "value"):
        x = arguments[tensor]
        assert isinstance(x, Tensor)
        past = torch.arange(x.shape[2])[:, None] >= sizes_of(name).q_len
        assert past.any()
        arguments[tensor] = x.detach().masked_fill(past, math.nan).requires_grad_()
    assert all(x.isfinite().all() for x in results(name, arguments).values())


@every
@pytest.mark.parametrize("hard", [False, True])
def test_tensors_as_transposition_slicing_and_expansion_leave_them(name: str, hard: bool) -> None:
    device = device_of(name)
    q = torch.randn(2, 40, 3, 8, device=device).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 3, 8, 50, device=device).mT.requires_grad_()
    v = torch.randn(1, 1, 50, 16, device=device)[..., ::2].expand(2, 3, 50, 8)
    given: Arguments = {"query": q, "key": k, "value": v, "hard": hard, "seed": 1}
    given |= {"noise": "none"} if name == "sdpa" else {}
    skip_if_unable(name, given)
    got = attend(name, given)
    want = reference.attention(attention_problem(**given)).output.cpu()  # type: ignore[arg-type]
    tolerance = 5e-4 if name == "triton" else 1e-4
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every
@pytest.mark.parametrize("hard", [False, True])
def test_shards_of_positions_and_heads_are_parts_of_the_whole(name: str, hard: bool) -> None:
    lengths = (40, 50, 13) if INTERPRETING else (70, 90, 29)
    q_len, k_len, cut = lengths
    batch = 1 if INTERPRETING else 2
    q, k, v = torch.randn(batch, 4, q_len, 8), torch.randn(batch, 4, k_len, 8), torch.randn(batch, 4, k_len, 8)
    more: Arguments = {"hard": hard, "seed": 3, "dropout_p": 0.2}
    more |= {"noise": "none", "dropout_p": 0.0} if name == "sdpa" else {}
    skip_if_unable(name, {"query": q, "key": k, "value": v, **more})

    def solve(q: Tensor, k: Tensor, v: Tensor, **place: object) -> Tensor:
        return attend(name, {"query": q, "key": k, "value": v, **more, **place})

    whole = solve(q, k, v)
    heads = slice(1, 3)
    torch.testing.assert_close(solve(q[:, :, cut:], k, v, q_offset=cut), whole[:, :, cut:])
    shard = solve(q[:, heads], k[:, heads], v[:, heads], h_offset=1, h_total=4)
    torch.testing.assert_close(shard, whole[:, heads])
    some = solve(q, k, v, attn_mask=torch.arange(k_len) >= cut)
    torch.testing.assert_close(solve(q, k[:, :, cut:], v[:, :, cut:], k_offset=cut), some)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", ["cpu", "blockwise"])
def test_results_do_not_depend_on_threads(name: str, hard: bool) -> None:
    """Kernels to the bit; torch's products of matrices may sum in another order."""
    arguments = _long(name, hard)
    one = results(name, arguments)
    torch.set_num_threads(2)
    try:
        two = results(name, arguments)
    finally:
        torch.set_num_threads(1)
    for label, x in one.items():
        assert torch.equal(two[label], x) if name == "cpu" else torch.allclose(two[label], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    ("name", "attention", "blocks"),
    [("cpu", cpu.attention, (16, 48, 128)), ("blockwise", blockwise.attention, (1, 270 * 7, 10**9))],
    ids=["cpu", "blockwise"],
)
def test_results_do_not_depend_on_the_block_size(
    name: str, attention: Callable[..., Tensor], blocks: tuple[int, ...], hard: bool
) -> None:
    arguments = _long(name, hard) if name == "cpu" else inputs(name, hard=hard, is_causal=True, dropout_p=0.1)
    want, keys = results(name, arguments), chosen_keys(name, arguments)
    for block in blocks:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("conformance.attend", lambda _, x, block=block: attention(attention_problem(**x), block))
            got = results(name, arguments)
            if hard:
                assert torch.equal(chosen_keys(name, arguments), keys)
        for label, x in want.items():
            torch.testing.assert_close(got[label], x, rtol=1e-4, atol=1e-5)


def _long(name: str, hard: bool) -> Arguments:
    """Several blocks of queries and keys, causal, with dropout."""
    arguments: Arguments = {
        "query": leaf(1, 2, 300, 16), "key": leaf(1, 2, 700, 16), "value": leaf(1, 2, 700, 16), "hard": hard,
        "seed": 4, "is_causal": True, "q_offset": 300, "dropout_p": 0.1,
        "tau": torch.full((2,), 0.5, requires_grad=True),
    }  # fmt: skip
    skip_if_unable(name, arguments)
    return arguments


@pytest.mark.parametrize("name", ["cpu", "blockwise", "triton"])
def test_second_derivatives_are_refused(name: str) -> None:
    x = torch.randn(1, 1, 5, 16, device=device_of(name), requires_grad=True)
    arguments: Arguments = {"query": x, "key": x, "value": x, "seed": 1}
    skip_if_unable(name, arguments)
    total = attend(name, arguments).sum()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(torch.autograd.grad(total, x, create_graph=True)[0].sum(), x)


@pytest.mark.parametrize("name", ["cpu", "blockwise", "triton"])
def test_vmap_is_refused(name: str) -> None:
    x = torch.randn(1, 1, 5, 16, device=device_of(name), requires_grad=True)
    arguments: Arguments = {"query": x, "key": x, "value": x, "seed": 1}
    skip_if_unable(name, arguments)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda q: attend(name, arguments | {"query": q}))(x.detach().expand(3, 1, 1, 5, 16))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "hard"), [("cpu", False), ("cpu", True), ("blockwise", True), ("triton", False), ("triton", True)]
)
def test_checkpoint_and_compile(name: str, hard: bool) -> None:
    """The Triton kernels are compiled on a device only; under the interpreter they are checkpointed."""
    x = torch.randn(1, 2, 20, 16, device=device_of(name), requires_grad=True)
    tau = torch.full((2,), 0.5, device=x.device, requires_grad=True)
    skip_if_unable(name, {"query": x, "key": x, "value": x, "tau": tau})

    def loss(x: Tensor) -> Tensor:
        more = {"dropout_p": 0.1, "is_causal": True, "impl": name}
        return ga.gumbel_attention(x, x, x, hard=hard, tau=tau, **more).square().sum()  # type: ignore[arg-type]

    ways = [loss, lambda x: torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)]
    if name != "triton" or CUDA:
        ways.append(torch.compile(loss, backend="aot_eager", fullgraph=True))
    grads = []
    for way in ways:
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(way(x), (x, tau)))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])


@every
def test_words_are_those_of_the_specification(name: str) -> None:
    """Bit for bit, read off choices: with every score the same, the key with the smallest word is taken."""
    for seed, h_offset, q_offset, k_offset in ((0, 0, 0, 0), (-1, 11, 9, 2**32 - 20), (2**60 + 7, 6, 2**31 - 5, 99)):
        zero = torch.zeros(1, 2, 33, 4)
        arguments: Arguments = {
            "query": zero, "key": zero[..., :20, :], "value": zero[..., :20, :], "seed": seed, "hard": True,
            "h_offset": h_offset, "h_total": 20, "q_offset": q_offset, "k_offset": k_offset,
        }  # fmt: skip
        skip_if_unable(name, arguments)
        head = torch.arange(2) + h_offset
        words = noise.word_grid(torch.tensor(seed), head, q_offset, 33, k_offset, 20)[None]
        smallest = words.topk(2, largest=False).values.double()
        apart = smallest[..., 1] / smallest[..., 0] > 1.001
        assert apart.double().mean() > 0.98
        assert torch.equal(chosen_keys(name, arguments)[apart], words.argmin(-1)[apart])


@every
def test_weights_are_refused(name: str) -> None:
    arguments = moved(inputs(name), device=device_of(name))
    with pytest.raises(ValueError, match=r"it holds no weights.*reference"):
        ga.gumbel_attention_with_info(**arguments, impl=name)  # type: ignore[arg-type]


def test_no_tensor_of_all_scores_is_made() -> None:
    """The largest tensor blockwise makes under a causal mask: far below one (Lq, Lk) of scores."""
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
