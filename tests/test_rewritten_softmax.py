"""What rewritten attention gets for its softmax: masks, dtypes, noise, heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gumbel_attention as ga
from gumbel_attention.integrations.rewritten_softmax import SoftmaxState


class Attends(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, dim=-1) @ k


def state_with(num_heads: int = 2, **settings: Any) -> SoftmaxState:
    return SoftmaxState(ga.GumbelAttentionConfig(**settings), num_heads, Attends())


def test_masked_keys_get_nothing_and_lost_rows_are_zero() -> None:
    state, low = state_with(noise="none"), torch.finfo(torch.float32).min
    scores = torch.randn(2, 2, 3, 4)
    scores[..., 1] = low
    scores[..., 2] += -1e4
    scores[0, 0, 0] = low
    scores[0, 0, 1] = -torch.inf
    scores.requires_grad_()
    weights = state.softmax(scores, dim=-1)
    assert not weights[0, 0, :2].any()
    assert torch.equal(weights[1], torch.softmax(scores, -1)[1])
    weights.square().sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    hard = state_with(noise="none", hard=True).softmax(torch.tensor([[-1e4, low], [low, low]]), dim=-1)
    assert hard.tolist() == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_dtype_is_that_of_torch(dtype: torch.dtype, wanted: torch.dtype | None, autocast: bool) -> None:
    scores = torch.randn(2, 3, 4, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = torch.softmax(scores, dim=1, dtype=wanted)
        got = state_with(noise="none").softmax(scores, dim=1, dtype=wanted)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


def test_shapes_on_meta() -> None:
    scores = torch.randn(2, 3, 4, dtype=torch.bfloat16, device="meta")
    assert state_with(noise="none").to("meta").softmax(scores, dim=1).dtype == torch.bfloat16


def test_the_settings_and_the_noise_are_those_of_gumbel_softmax() -> None:
    state, scores = state_with(tau=0.7, noise_scale=0.5, hard=True), torch.randn(2, 2, 3, 4)
    settings: dict[str, Any] = {"tau": 0.7, "noise_scale": 0.5, "hard": True}
    torch.manual_seed(5)
    got = state.softmax(scores, dim=-1)
    torch.manual_seed(5)
    assert torch.equal(got, ga.gumbel_softmax(scores, **settings))
    state.eval()
    assert torch.equal(state.softmax(scores, dim=-1), ga.gumbel_softmax(scores, noise="none", **settings))


@pytest.mark.parametrize("flat", [False, True])
def test_heads_and_their_temperatures(flat: bool) -> None:
    scores = torch.randn(3, 2, 5, 4)
    given = scores.flatten(0, 1) if flat else scores
    one = state_with(noise="none", tau=0.5, heads=(-1,)).softmax(given, dim=-1).reshape_as(scores)
    assert torch.equal(one[:, 0], torch.softmax(scores[:, 0], -1))
    torch.testing.assert_close(one[:, 1], torch.softmax(scores[:, 1] / 0.5, -1))
    learned = state_with(noise="none", learn_tau="head")
    assert learned.log_tau is not None
    with torch.no_grad():
        learned.log_tau.copy_(torch.tensor([0.5, 2.0]).log())
    weights = learned.softmax(given, dim=-1).reshape_as(scores)
    torch.testing.assert_close(weights, torch.softmax(scores / torch.tensor([0.5, 2.0])[:, None, None], -1))
    weights[:, 1].square().sum().backward()
    assert learned.log_tau.grad is not None
    assert learned.log_tau.grad[1] != 0 == learned.log_tau.grad[0]


def test_heads_need_scores_that_show_them() -> None:
    state = state_with(noise="none", heads=(0,))
    for shape in ((3, 5, 2, 4), (3, 5, 4), (5, 4), (2, 3, 2, 5, 4)):
        with pytest.raises(ValueError, match="learn_tau='head' and collect_log_probs need scores"):
            state.softmax(torch.randn(shape), dim=-1)


def test_settings_that_a_softmax_cannot_honour() -> None:
    with pytest.raises(ValueError, match="computes whole attention"):
        state_with(impl="triton")
    with pytest.raises(ValueError, match="a dim"):
        state_with().softmax(torch.randn(2, 3))
