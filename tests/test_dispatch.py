"""Which implementation runs, and that an explicit one is that one or an error."""

import pytest
import torch

import gumbel_attention as ga
from gumbel_attention import dispatch
from gumbel_attention.impl import cpu


def qkv(length: int) -> list[torch.Tensor]:
    return [torch.randn(1, 2, length, 4) for _ in range(3)]


def test_no_noise_goes_to_torchs_own() -> None:
    assert ga.explain(*qkv(8), noise="none").impl == "sdpa"


def test_size_decides_what_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "WORTH_IT", {"cpu": 0, "blockwise": 2 * 8 * 8})
    monkeypatch.setattr(cpu, "available", lambda: "no compiler")
    small = ga.explain(*qkv(8))
    assert small.impl == "reference"
    assert small.rejected["blockwise"] == "it is not worth it for 128 scores"
    larger = ga.explain(*qkv(9))
    assert larger.impl == "blockwise"
    first, *rejected = str(larger).splitlines()
    assert first == "impl='blockwise' runs"
    assert rejected[0] == "  not sdpa: it has neither noise nor a hard choice"
    assert rejected[1].startswith("  not triton: ")
    assert rejected[2] == "  not cpu: no compiler"


def test_few_scores_do_not_make_it_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_kernels() -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(cpu, "available", compile_kernels)
    assert ga.explain(*qkv(64)).impl == "reference"
    with pytest.raises(AssertionError, match="compiled"):
        ga.explain(*qkv(128))


def test_kernels_run_where_they_can() -> None:
    inputs = qkv(128)
    reason = cpu.available()
    if reason is not None:
        pytest.skip(f"no CPU kernels: {reason}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert ga.explain(*(x.to(dtype) for x in inputs)).impl == "cpu"
    assert ga.explain(*(x.double() for x in inputs)).rejected["cpu"].startswith("it computes in float32")
    same = [ga.gumbel_attention(*inputs, hard=True, seed=1, impl=impl) for impl in ("auto", "reference")]
    torch.testing.assert_close(*same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_sequences_train_without_the_slow_backward_pass_of_half_precision(dtype: torch.dtype) -> None:
    """On one core and (64, 12, 26, 32) it takes 92 ms in bfloat16, 93 in float16 and 23 in float32."""
    short, long = ([x.to(dtype).requires_grad_() for x in qkv(length)] for length in (64, 128))
    explained = ga.explain(*short, noise="none")
    assert "slow for short sequences" in explained.rejected["sdpa"]
    assert ga.explain(*long, noise="none").impl == "sdpa"
    assert ga.explain(*(x.detach() for x in short), noise="none").impl == "sdpa"
    with torch.no_grad():
        assert ga.explain(*short, noise="none").impl == "sdpa"
    assert ga.explain(*(x.detach().float().requires_grad_() for x in short), noise="none").impl == "sdpa"


def test_explaining_draws_nothing() -> None:
    inputs = qkv(8)
    state = torch.get_rng_state()
    for seed in (None, 1):
        assert (
            ga.explain(*inputs, dropout_p=0.1, noise="none", seed=seed)
            .rejected["sdpa"]
            .startswith("on the CPU it keeps all")
        )
    assert ga.explain(*inputs, dropout_p=0.1, noise="none", impl="sdpa").impl == "sdpa"
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
    with pytest.raises(ValueError, match=f"impl='sdpa' cannot compute this call: .*{reason}.*Use impl='auto'"):
        ga.gumbel_attention(*qkv(8), impl="sdpa", **settings)


@pytest.mark.parametrize("impl", ["auto", "sdpa", "cpu", "blockwise", "reference"])
def test_every_choice_gives_the_same_softmax(impl: str) -> None:
    q, k, v = qkv(8)
    if impl == "cpu" and cpu.available() is not None:
        pytest.skip(f"no CPU kernels: {cpu.available()}")
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ga.gumbel_attention(q, k, v, noise="none", impl=impl), want)


def test_out_of_memory_names_what_needs_less_and_leaves_the_process_usable() -> None:
    long = torch.zeros(1, 1, 2**20, 1)
    with pytest.raises(RuntimeError, match="allocate") as raised:
        ga.gumbel_attention(long, long, long, impl="reference")
    assert "impl='blockwise'" in raised.value.__notes__[0]
    short = torch.randn(1, 1, 4, 2)
    assert ga.gumbel_attention(short, short, short, impl="reference").isfinite().all()


def test_other_errors_get_no_such_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: object) -> None:
        raise RuntimeError("broken")

    broken_one = ga.dispatch.IMPLEMENTATIONS["reference"]._replace(attention=broken)
    monkeypatch.setitem(ga.dispatch.IMPLEMENTATIONS, "reference", broken_one)
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(RuntimeError, match="broken") as raised:
        ga.gumbel_attention(q, q, q, impl="reference")
    assert not getattr(raised.value, "__notes__", [])
