"""Which implementation runs, and that an explicit one is that one or an error."""

import pytest
import torch

import gumbel_attention as ga
from gumbel_attention import dispatch


def qkv(length: int) -> list[torch.Tensor]:
    return [torch.randn(1, 2, length, 4) for _ in range(3)]


def test_no_noise_goes_to_torchs_own() -> None:
    assert ga.explain(*qkv(8), noise="none").impl == "sdpa"


def test_size_decides_between_keeping_and_computing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "SMALL", 2 * 8 * 8)
    assert "few enough" in ga.explain(*qkv(8)).rejected["blockwise"]
    larger = ga.explain(*qkv(9))
    assert larger.impl == "blockwise"
    assert str(larger) == "impl='blockwise' runs\n  not sdpa: it has neither noise nor a hard choice"


def test_explaining_draws_nothing() -> None:
    inputs = qkv(8)
    state = torch.get_rng_state()
    assert ga.explain(*inputs, dropout_p=0.1, noise="none").impl == "sdpa"
    assert ga.explain(*inputs, dropout_p=0.1, noise="none", seed=1).impl == "reference"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"noise": "gumbel"}, "neither noise nor a hard choice"),
        ({"noise": "none", "hard": True}, "neither noise nor a hard choice"),
        ({"noise": "none", "softcap": 2.0}, "neither softcap nor sinks"),
        ({"noise": "none", "dropout_p": 0.1, "seed": 1}, "cannot repeat a given seed"),
    ],
)
def test_an_explicit_choice_never_falls_back(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=f"impl='sdpa' cannot compute this call: .*{reason}.*Use 'auto'"):
        ga.gumbel_attention(*qkv(8), impl="sdpa", **settings)


@pytest.mark.parametrize("impl", ["auto", "sdpa", "blockwise", "reference"])
def test_every_choice_gives_the_same_softmax(impl: str) -> None:
    q, k, v = qkv(8)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ga.gumbel_attention(q, k, v, noise="none", impl=impl), want)
