"""Every implementation against the reference on shapes and settings that hypothesis draws."""

import tempfile

import pytest
import torch
from hypothesis import configuration, given, settings
from hypothesis import strategies as st

from conformance import (
    DTYPES,
    HALF,
    MASK_GRADIENT,
    MASKS,
    NAMES,
    Arguments,
    Sizes,
    check,
    leaf,
    mask_of,
    moved,
    skip_if_unable,
    thinned,
)
from interpreter import INTERPRETER_WARNINGS

configuration.set_hypothesis_home_dir(tempfile.gettempdir())
pytestmark = INTERPRETER_WARNINGS
ARMS_OF = {
    "sdpa": [("none", False)],
    "triton": [("gumbel", False), ("gumbel", True), ("none", False), ("none", True)],
    "cpu": [("gumbel", False), ("gumbel", True), ("none", False), ("none", True)],
    "blockwise": [("gumbel", False), ("gumbel", True), ("none", False), ("none", True), ("normal", True)],
}


@st.composite
def cases(draw: st.DrawFn, name: str) -> Arguments:
    """Lengths from 1 up, over a tile's border; few heads, shared or not; any place in the field of noise."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if thinned(name):
        kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    sizes = Sizes(
        draw(st.integers(1, 1 if thinned(name) else 3)), kv_heads * group, kv_heads, draw(st.integers(1, 40)),
        draw(st.integers(1, 70)), draw(st.integers(1, 40)), draw(st.integers(1, 40)),
    )  # fmt: skip
    family, hard = draw(st.sampled_from(ARMS_OF[name]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    mask = mask_of(draw(st.sampled_from(MASKS)), sizes)
    if mask.get("is_causal") or draw(st.booleans()):
        mask |= {"is_causal": True, "q_offset": draw(st.integers(0, 70)), "k_offset": draw(st.integers(0, 40))}
    batch, heads, _, q_len, k_len, d, d_v = sizes
    per_head = torch.full((heads,), draw(st.sampled_from([0.01, 0.1, 0.5, 1.0, 3.0, 10.0])))
    arguments: Arguments = {
        "query": leaf(batch, heads, q_len, d), "key": leaf(batch, kv_heads, k_len, d),
        "value": leaf(batch, kv_heads, k_len, d_v), "enable_gqa": True, "noise": family, "hard": hard,
        "tau": per_head.requires_grad_(), "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])), **mask,
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
    }  # fmt: skip
    if name == "sdpa":
        arguments["dropout_p"] = 0.0
    bias = arguments.get("attn_mask")
    if isinstance(bias, torch.Tensor) and bias.is_floating_point():
        bias.requires_grad_(name in MASK_GRADIENT)
    return moved(arguments, draw(st.sampled_from([x for x in DTYPES[name] if x not in HALF])))


@pytest.mark.parametrize("name", NAMES)
def test_any_shape(name: str) -> None:
    q = torch.randn(1, 1, 2, 4)
    skip_if_unable(name, {"query": q, "key": q, "value": q, "noise": "none"})
    drawn = []

    @settings(max_examples=12 if thinned(name) else 40, deadline=None, derandomize=True, print_blob=False)
    @given(arguments=cases(name))
    def draws(arguments: Arguments) -> None:
        drawn.append(arguments)
        check(name, arguments, cancelled=True)

    draws()
    lengths = {(x["query"].shape[2], x["key"].shape[2]) for x in drawn}  # type: ignore[attr-defined]
    assert len(lengths) > 5
