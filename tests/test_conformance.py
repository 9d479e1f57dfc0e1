"""Every implementation against the reference in float64 on the same noise: outputs, choices and all gradients."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from conformance import (
    ARMS,
    CUDA,
    DTYPES,
    HALF,
    MASKS,
    NAMES,
    TAUS,
    Arguments,
    attend,
    case,
    check,
    check_choices,
    leaf,
    moved,
    sizes_of,
    skip_if_unable,
    thinned,
)
from interpreter import INTERPRETER_WARNINGS

pytestmark = INTERPRETER_WARNINGS
HARD = ("st", "det-st")
KERNEL_ARMS = ("soft", "st", "det-st", "softmax")


def known_defect(name: str, arm: str, mask: str, tau: float, dtype: torch.dtype) -> tuple[str, bool] | None:
    """Why a case is expected to fail, and whether it must."""
    if dtype not in HALF:
        return None
    if name == "sdpa" and mask == "float" and tau < 0.1 and arm == "softmax":
        return "the mask divided by tau is rounded to the query's dtype", True
    return None


def matrix() -> Iterator[object]:
    """Every arm with every mask, temperature and dtype; where cases are thinned out, every arm with every mask."""
    for name in NAMES:
        for i, arm in enumerate(ARMS if name != "sdpa" else ["softmax"]):  # torch's own has no other
            for j, mask in enumerate(MASKS):
                for t, tau in enumerate(TAUS):
                    for d, dtype in enumerate(DTYPES[name]):
                        if thinned(name) and not (t == (i + j) % 3 and d == (i + 2 * j) % 3):
                            continue
                        if name == "blockwise" and dtype in HALF and d % 2 != (i + j + t) % 2:
                            continue  # its blocks are computed in float32 in either
                        defect = known_defect(name, arm, mask, tau, dtype)
                        marks = [] if defect is None else [pytest.mark.xfail(reason=defect[0], strict=defect[1])]
                        label = f"{name}-{arm}-{mask}-{tau}-{str(dtype).removeprefix('torch.')}"
                        yield pytest.param(name, arm, mask, tau, dtype, marks=marks, id=label)


@pytest.mark.parametrize(("name", "arm", "mask", "tau", "dtype"), list(matrix()))
def test_every_implementation_is_the_reference(name: str, arm: str, mask: str, tau: float, dtype: torch.dtype) -> None:
    check(name, case(name, arm, mask, tau, dtype))


@pytest.mark.parametrize("arm", KERNEL_ARMS)
@pytest.mark.parametrize(
    ("name", "mask"),
    [(name, mask) for name in NAMES for mask in (("padding",) if thinned(name) else MASKS)],
)
def test_dropout_seeds_offsets_and_head_shards_at_once(name: str, mask: str, arm: str) -> None:
    offsets = {} if mask.startswith("causal") else {"q_offset": 13, "k_offset": 2**31 + 7}
    seed = torch.tensor([-5, 2**40])[: sizes_of(name).batch]
    dropout = 0.0 if name == "sdpa" else 0.3
    shard = {"h_offset": 2, "h_total": 9, "seed": seed, "dropout_p": dropout}
    check(name, case(name, arm, mask, 0.7, torch.float32, **shard, **offsets))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", NAMES)
def test_soft_cap_sinks_and_offsets_of_each_example(name: str, arm: str) -> None:
    """Arguments that only blockwise and the reference take, with a temperature for each head."""
    heads = sizes_of(name).heads
    offsets = torch.tensor([6, 2])[: sizes_of(name).batch]
    more: Arguments = {
        "softcap": 1.5, "sinks": leaf(heads), "tau": torch.rand(heads).add(0.5).requires_grad_(),
        "seed": torch.tensor([5, 9])[: len(offsets)], "dropout_p": 0.3, "is_causal": True, "q_offset": offsets,
    }  # fmt: skip
    for dtype in set(DTYPES[name]) - set(HALF):
        check(name, moved(case(name, arm, "float", 1.0, dtype) | more, dtype))


@pytest.mark.parametrize("arm", ["softmax", "st"])
@pytest.mark.parametrize("name", NAMES)
def test_offsets_of_each_example(name: str, arm: str) -> None:
    batch = sizes_of(name).batch
    place: Arguments = {"is_causal": True, "q_offset": 7, "k_offset": torch.tensor([0, 3])[:batch]}
    check(name, case(name, arm, "none", 0.7, DTYPES[name][0], **place))


PLACES = [(1, 1, 0), (1, 700, 9), (200, 2, 300), (130, 1100, 0), (75, 600, 37)]
PLACES_OF = {
    "sdpa": PLACES[::4],
    "triton": [(1, 1, 0), (40, 70, 37)] if thinned("triton") else PLACES,
    "cpu": PLACES,
    "blockwise": PLACES[::4],
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("arm", KERNEL_ARMS)
@pytest.mark.parametrize(("name", "place"), [(name, place) for name in NAMES for place in PLACES_OF[name]])
def test_ragged_lengths_over_several_blocks(name: str, place: tuple[int, int, int], arm: str, causal: bool) -> None:
    q_len, k_len, k_offset = place
    arguments: Arguments = {
        "query": leaf(1, 2, q_len, 7), "key": leaf(1, 1, k_len, 7), "value": leaf(1, 1, k_len, 9), "enable_gqa": True,
        "is_causal": causal, "q_offset": max(0, k_offset + k_len - q_len - 3), "k_offset": k_offset, "seed": 2,
        **ARMS[arm],
    }  # fmt: skip
    check(name, arguments)


@pytest.mark.parametrize("arm", KERNEL_ARMS)
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_long_masks_of_every_shape(name: str, arm: str) -> None:
    """Where kernels skip blocks of keys that no query of a block sees."""
    if thinned(name):
        pytest.skip("too long for Triton's interpreter")
    full = torch.rand(2, 2, 90, 600) > 0.4
    full[..., 500:590] = False
    q, k, v = leaf(2, 2, 90, 4), leaf(2, 2, 600, 4), leaf(2, 2, 600, 4)
    for keep in (full, full[:, :1], full[:1], full[..., :1, :], full[..., :1], full.transpose(0, 1)):
        bias = torch.randn(keep.shape).masked_fill(~keep, -math.inf)
        for mask in (keep, bias, bias.clamp(min=torch.finfo().min)):
            check(name, {"query": q, "key": k, "value": v, "attn_mask": mask, "is_causal": True, "q_offset": 505,
                         "seed": 3, **ARMS[arm]})  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_float_masks_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    sizes = sizes_of(name)
    bias = torch.randn(sizes.q_len, sizes.k_len).to(dtype)
    bias = bias.masked_fill(torch.rand(bias.shape) > 0.8, torch.finfo(dtype).min)
    for arm in ("softmax",) if name == "sdpa" else ("soft", "st"):
        check(name, case(name, arm, "none", 1.0, torch.float32) | {"attn_mask": bias})


HEAD_DIMS = [(40, 40, 10.0), (64, 16, 0.02), (5, 33, 1.0), (1, 1, 0.1)]


@pytest.mark.parametrize("arm", KERNEL_ARMS)
@pytest.mark.parametrize(("d", "d_v", "tau"), HEAD_DIMS)
@pytest.mark.parametrize("name", NAMES)
def test_head_dimensions_and_temperatures(name: str, d: int, d_v: int, tau: float, arm: str) -> None:
    """A temperature that is a number."""
    batch, heads, kv_heads, q_len, k_len, _, _ = sizes_of(name)
    check(
        name,
        {"query": leaf(batch, heads, q_len, d), "key": leaf(batch, kv_heads, k_len, d),
         "value": leaf(batch, kv_heads, k_len, d_v), "enable_gqa": True, "tau": tau, "seed": 3, **ARMS[arm]},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", HALF)
def test_sdpa_with_a_tensor_for_tau_rounds_the_query_over_tau(dtype: torch.dtype) -> None:
    """A power of two costs nothing; another temperature costs the rounding of query / tau."""
    arguments = case("sdpa", "softmax", "none", 0.7, dtype)
    for tau in (0.5, 2.0):
        check("sdpa", arguments | {"tau": torch.full((4,), tau)})


@pytest.mark.xfail(strict=True, reason="query / tau is rounded to the query's dtype")
@pytest.mark.parametrize("dtype", HALF)
def test_sdpa_with_a_tensor_for_a_low_tau(dtype: torch.dtype) -> None:
    check("sdpa", case("sdpa", "softmax", "none", 0.7, dtype) | {"tau": torch.full((4,), 0.011)})


@pytest.mark.parametrize(("arm", "tau"), [("st", 0.01), ("st", 1.0), ("det-st", 0.01)])
@pytest.mark.parametrize("name", NAMES)
def test_choices_of_many_rows(name: str, arm: str, tau: float) -> None:
    """Of 4096 rows, by interpreter 1024, at most one in a thousand is too close to compare."""
    shape, q_len, k_len = ((4, 4), 256, 300) if not thinned(name) else ((1, 2), 512, 100)
    arguments: Arguments = {
        "query": torch.randn(*shape, q_len, 16), "key": torch.randn(*shape, k_len, 16),
        "value": torch.randn(*shape, k_len, 1), "seed": 7, "tau": tau, **ARMS[arm],
    }  # fmt: skip
    skip_if_unable(name, arguments)
    check_choices(name, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_the_lowest_index_wins_ties(name: str) -> None:
    keep = torch.ones(33, 50, dtype=torch.bool).triu(3)
    for hard in (False, True):
        arguments: Arguments = {
            "query": torch.zeros(1, 2, 33, 16), "key": torch.zeros(1, 2, 50, 16), "value": torch.randn(1, 2, 50, 4),
            "attn_mask": keep, "noise": "none", "hard": hard,
        }  # fmt: skip
        if not hard:
            check(name, arguments | {"query": leaf(1, 2, 33, 16)})
            continue
        skip_if_unable(name, arguments)
        value = arguments["value"]
        assert isinstance(value, Tensor)
        assert torch.equal(attend(name, arguments), value[:, :, 3:36])


def test_what_is_compared_is_compared() -> None:
    """The comparison itself: another seed, another dtype's error, and one wrong key are all noticed."""
    arguments = case("blockwise", "st", "causal", 0.7, torch.float32)
    check("blockwise", arguments)
    with pytest.raises(AssertionError):
        _check_against("blockwise", arguments, arguments | {"seed": 6})
    arguments = case("blockwise", "soft", "causal", 0.7, torch.float32)
    with pytest.raises(AssertionError):
        _check_against("blockwise", arguments, moved(moved(arguments, torch.bfloat16), torch.float32))


def _check_against(name: str, arguments: Arguments, instead: Arguments) -> None:
    """``check`` where the implementation is given other arguments than the reference."""
    import conformance

    honest = conformance.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            conformance,
            "attend",
            lambda which, given: honest(which, given if which == "reference" else _with_leaves(given, instead)),
        )
        check(name, arguments)


def _with_leaves(given: Arguments, instead: Arguments) -> Arguments:
    """``given`` with the numbers of ``instead``; gradients still reach the tensors of ``given``."""

    def swap(name: str, x: object) -> object:
        other = instead[name]
        if not isinstance(x, Tensor) or not isinstance(other, Tensor) or x.shape != other.shape:
            return x if isinstance(x, Tensor) else other
        return x + (other.detach() - x.detach()) if x.is_floating_point() else other

    return {name: swap(name, x) for name, x in given.items()}


def test_on_a_gpu_nothing_is_thinned_out() -> None:
    assert thinned("triton") != CUDA
    assert not any(thinned(name) for name in NAMES if name != "triton")
