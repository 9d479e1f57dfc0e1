"""The Triton kernels by themselves: words, logarithms, tiles, refusals. Values are compared in the conformance tests.

Without a GPU both run under Triton's interpreter. That is chosen by an environment variable before triton is
imported, for good: they run in a process of their own, which a test here starts.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conformance import (
    CUDA,
    Arguments,
    case,
    chosen_keys,
    device_of,
    moved,
    results,
    triton_noise_error,
)
from gumbel_attention import noise
from gumbel_attention.arguments import attention_problem
from gumbel_attention.impl import reference
from gumbel_attention.impl import triton as kernels
from interpreter import INTERPRETER_WARNINGS, INTERPRETING, run_interpreted

pytestmark = INTERPRETER_WARNINGS
inside = pytest.mark.skipif(not INTERPRETING and not CUDA, reason="runs on a GPU, or under Triton's interpreter")
TESTS = Path(__file__).parent


@pytest.mark.skipif(INTERPRETING, reason="this is that process")
@pytest.mark.slow
def test_kernels_in_a_process_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    """What is here, and the Triton cases of the conformance tests."""
    files = [__file__, *sorted(str(path) for path in TESTS.glob("test_conformance*.py"))]
    printed = run_interpreted("-k", "triton", *files)
    with capsys.disabled():
        print("\n".join(line for line in printed.splitlines() if "left out" in line or " passed" in line))


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, gumbel_attention.impl.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@inside
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stream", [0, 1])
def test_words_are_those_of_the_specification(transposed: bool, stream: int) -> None:
    import triton
    import triton.language as tl

    from gumbel_attention.impl.triton.noise import philox_key, word_tile

    @triton.jit
    def write(out, seed, bh, q, k, STREAM: tl.constexpr, KEYS_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
        ka, kb = philox_key(tl.load(seed), bh.to(tl.uint32))
        word = word_tile(ka, kb, q, k, STREAM, 32, 64, KEYS_FIRST)
        place = tl.arange(0, 64 if KEYS_FIRST else 32)[:, None] * (32 if KEYS_FIRST else 64)
        tl.store(out + place + tl.arange(0, 32 if KEYS_FIRST else 64)[None, :], word.to(tl.int64))

    write.fn.__globals__.update(tl=tl, philox_key=philox_key, word_tile=word_tile)
    device = device_of("triton")
    for seed, bh, q, k in ((0, 0, 0, 0), (-1, 35, 4080, 65520), (1234567890123456789, 6, 2**31 - 16, -16)):
        key = torch.tensor(seed)
        out = torch.empty((64, 32) if transposed else (32, 64), dtype=torch.int64, device=device)
        write[(1,)](out, key.to(device), bh, q, k, stream, transposed)
        want = noise.word_grid(key, torch.tensor(bh), q % 2**32, 32, k % 2**32, 64, stream)
        assert torch.equal(out.cpu(), want.mT if transposed else want)


@inside
def test_gumbel_values_are_within_the_error_that_choices_allow_for() -> None:
    """At both ends, where the series and the logarithm meet, and anywhere: up to a constant, which no choice sees."""
    import triton
    import triton.language as tl

    from gumbel_attention.impl.triton.noise import log2_exponential

    @triton.jit
    def write(out, words, N: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.program_id(0) * N + tl.arange(0, N)
        tl.store(out + place, log2_exponential(tl.load(words + place).to(tl.uint32)))

    write.fn.__globals__.update(tl=tl, log2_exponential=log2_exponential)
    logarithmic = (2 ** torch.linspace(0, 32, 2**15, dtype=torch.float64) - 1).long().clamp(max=2**32 - 1)
    words = torch.cat([logarithmic, 2**32 - 1 - logarithmic, torch.randint(0, 2**32, (2**16,))])
    device, block = device_of("triton"), 4096
    out = torch.empty(words.shape, device=device)
    write[(len(words) // block,)](out, words.to(device), block)
    constant = torch.log2(torch.log2(torch.tensor(torch.e, dtype=torch.float64)))
    got = -(out.cpu().double() - constant) * torch.log(torch.tensor(2.0, dtype=torch.float64))
    error, allowed = (got - noise.gumbel(words)).abs(), triton_noise_error(words)
    assert got.isfinite().all()
    assert (error <= allowed).all(), (error - allowed).max()
    assert error.max() < 0.45
    assert (allowed > 3e-3).double()[-(2**16) :].mean() < 1e-3


@inside
@pytest.mark.parametrize("arm", ["soft", "st"])
def test_results_do_not_depend_on_tiles(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gumbel_attention.impl.triton import launch, sizes

    arguments = case("triton", arm, "causal, offset", 0.7, torch.float32)
    want, keys = results("triton", arguments), chosen_keys("triton", arguments)
    tiles = {"forward_tile": (16, 32), "rows_tile": (64, 16), "columns_tile": (32, 16)}
    for chooser, (q, k) in tiles.items():
        monkeypatch.setattr(launch, chooser, lambda *_, q=q, k=k: sizes.Tile(q, k, 4, 1))
    got = results("triton", arguments)
    if arm == "st":
        assert torch.equal(chosen_keys("triton", arguments), keys)
    for label, x in want.items():
        torch.testing.assert_close(got[label], x, rtol=1e-4, atol=1e-5)


@inside
def test_a_large_common_gradient_costs_no_precision() -> None:
    """dP far larger than its differences: the sums of a hard choice are relative to a guess of delta."""
    arguments = case("triton", "st", "none", 1.0, torch.float32) | {"noise_scale": 1.0}
    arguments["value"] = (arguments["value"].detach() * 0.25 + 8.0).requires_grad_()  # type: ignore[attr-defined]
    arguments = moved(arguments, torch.bfloat16)
    d_out = torch.randn(1, 2, 21, 24) if not CUDA else None
    got = results("triton", arguments, d_out)
    want = results("reference", moved(arguments, torch.float64), d_out)
    for label in ("query", "key"):
        assert (got[label].double() - want[label]).norm() <= 0.02 * want[label].norm()


@inside
def test_a_seed_for_each_example_and_a_shard_of_heads() -> None:
    device = device_of("triton")
    q, k = torch.randn(2, 2, 5, 16, device=device), torch.randn(2, 2, 7, 16, device=device)
    for more in ({"seed": torch.tensor([5, -9], device=device)}, {"seed": 5, "h_offset": 3, "h_total": 8}):
        problem = attention_problem(q, k, k, hard=True, **more)  # type: ignore[arg-type]
        assert torch.equal(kernels.attention(problem), reference.attention(problem).output)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"softcap": 2.0}, "soft cap"),
        ({"sinks": torch.zeros(2)}, "sinks"),
        ({"attn_mask": torch.zeros(3, 3, requires_grad=True)}, "no gradient"),
        ({"noise": "normal"}, "normal noise"),
        ({"is_causal": True, "q_offset": torch.tensor([1])}, "offsets"),
        ({"scale": -1.0}, "scale"),
    ],
)
def test_what_the_kernels_lack_is_named(more: Arguments, reason: str) -> None:
    q = torch.randn(1, 2, 3, 16)
    problem = attention_problem(q, q, q, **more)  # type: ignore[arg-type]
    assert reason in (kernels.unsupported(problem) or "")
    with pytest.raises(ValueError, match=reason):
        kernels.attention(problem)


def test_dtypes_devices_and_sizes_are_named() -> None:
    q = torch.randn(1, 2, 3, 16)
    wide, double = q.new_zeros(1, 2, 3, 257), q.double()
    assert "256" in (kernels.unsupported(attention_problem(wide, wide, q)) or "")
    assert "float64" in (kernels.unsupported(attention_problem(double, double, double)) or "")
    if not INTERPRETING:
        assert kernels.unsupported(attention_problem(q, q, q)) is not None  # tensors on a CPU
