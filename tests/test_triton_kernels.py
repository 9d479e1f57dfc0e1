"""The Triton kernels against the reference on the same noise, under Triton's interpreter, on any machine.

The interpreter is chosen by an environment variable before triton is imported, for good: the tests here run in a
process of their own, which one of them starts.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from gumbel_attention import noise
from gumbel_attention.arguments import attention_problem
from gumbel_attention.impl import reference
from gumbel_attention.impl import triton as kernels

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETING, reason="runs in a process of its own, under Triton's interpreter")
pytestmark = [  # the interpreter's, in numpy
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

ARMS = {
    "soft": {"noise": "gumbel"},
    "st": {"noise": "gumbel", "hard": True},
    "det-st": {"noise": "none", "hard": True},
    "softmax": {"noise": "none"},
}
LQ, LK = 21, 37  # two tiles of queries in the column kernel, three of keys in the others
GAP = 1e-3
"""Two noisy logits closer than this may change places: twice the error of the fast Gumbel where it matters."""


def version(package: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", importlib.metadata.version(package))[:2])


def no_interpreter() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        return "the interpreter of triton < 3.7 needs numpy < 2.4"
    return None


@pytest.mark.skipif(INTERPRETING, reason="this is that process")
@pytest.mark.slow
def test_kernels_in_a_process_of_their_own() -> None:
    reason = no_interpreter()
    if reason is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, gumbel_attention.impl.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def mask_of(kind: str) -> dict[str, object]:
    """Mask arguments, with rows that see nothing where the kind allows it."""
    if kind == "padding":
        keep = torch.ones(1, 1, 1, LK, dtype=torch.bool)
        keep[..., 29:] = keep[..., :5] = False
        return {"attn_mask": keep}
    if kind == "bool":
        keep = torch.rand(1, 2, LQ, LK) > 0.5
        keep[0, 1, 3] = keep[0, :, 20] = False
        return {"attn_mask": keep}
    if kind == "float":
        bias = torch.randn(2, LQ, LK).masked_fill(torch.rand(LQ, LK) > 0.8, -math.inf)
        bias[:, 7] = -math.inf
        return {"attn_mask": bias}
    if kind == "window":
        distance = torch.arange(LQ)[:, None] - torch.arange(LK)
        return {"attn_mask": (distance >= 0) & (distance < 5)}
    offsets = {"q_offset": 21, "k_offset": 5} if kind == "causal, offset" else {}
    return {"is_causal": kind.startswith("causal"), **offsets}


def leaves(d: int = 16, dv: int = 24, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """One example with two query heads that share a key head."""
    return {
        "query": torch.randn(1, 2, LQ, d, dtype=dtype), "key": torch.randn(1, 1, LK, d, dtype=dtype),
        "value": torch.randn(1, 1, LK, dv, dtype=dtype), "enable_gqa": True,
    }  # fmt: skip


def double(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def gradients(implementation: object, arguments: dict[str, object], names: list[str], d_out: Tensor) -> list[Tensor]:
    """The output, and the gradients by the arguments in ``names``."""
    asked = {name: x.clone().requires_grad_() for name in names if isinstance(x := arguments[name], Tensor)}
    output = implementation(attention_problem(**(arguments | asked)))  # type: ignore[operator,arg-type]
    return [output, *torch.autograd.grad(output, list(asked.values()), d_out)]


def exact(arguments: dict[str, object], names: list[str], d_out: Tensor) -> list[Tensor]:
    """The same by the reference in float64."""
    arguments = {name: double(x) for name, x in arguments.items()}
    return gradients(lambda problem: reference.attention(problem).output, arguments, names, d_out.double())


def clear_rows(arguments: dict[str, object]) -> Tensor:
    """(B, H, Lq): rows whose two best float64 logits are more than GAP apart, or that see less than two keys."""
    problem = attention_problem(**{name: double(x) for name, x in arguments.items()})  # type: ignore[arg-type]
    q, k = problem.query, problem.key.repeat_interleave(problem.query.shape[1] // problem.key.shape[1], dim=1)
    z = q @ k.mT * problem.scale
    if problem.bias is not None:
        z = z + problem.bias
    if problem.choice.noise == "gumbel":
        assert problem.choice.where is not None
        z = z + problem.choice.noise_scale * noise.gumbel(problem.choice.where.words(noise.STREAM_NOISE))
    visible = problem.visible()
    if visible is not None:
        z = z.masked_fill(~visible, -math.inf)
    best, second = z.topk(2, dim=-1).values.unbind(-1)
    return ~(best - second <= GAP)


def compare(arguments: dict[str, object], tolerance: float, *, bound: float = math.inf) -> None:
    """Error of the output and of each gradient, relative to its norm."""
    names = [
        name for name in ("query", "key", "value", "tau", "noise_scale") if isinstance(arguments.get(name), Tensor)
    ]
    q, v = arguments["query"], arguments["value"]
    assert isinstance(q, Tensor)
    assert isinstance(v, Tensor)
    d_out = torch.randn(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    if arguments.get("hard"):
        clear = clear_rows(arguments)
        assert (~clear).double().mean() <= 0.03, "an unlucky seed"
        d_out = d_out * clear[..., None]
    got = gradients(kernels.attention, arguments, names, d_out)
    want = exact(arguments, names, d_out)
    if arguments.get("hard"):
        got[0], want[0] = got[0][clear], want[0][clear]
        assert (got[0].double() - want[0]).abs().max() <= 1e-6 * want[0].abs().max().clamp(max=bound)
    for name, a, b in zip(["output", *names], got, want, strict=True):
        assert a.isfinite().all(), name
        assert a.dtype == q.dtype or name not in names[:3]
        assert (a.double() - b).norm() <= tolerance * b.norm(), name


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
    for seed, bh, q, k in ((0, 0, 0, 0), (-1, 35, 4080, 65520), (1234567890123456789, 6, 2**31 - 16, -16)):
        key = torch.tensor(seed)
        out = torch.empty((64, 32) if transposed else (32, 64), dtype=torch.int64)
        write[(1,)](out, key, bh, q, k, stream, transposed)
        want = noise.word_grid(key, torch.tensor(bh), q % 2**32, 32, k % 2**32, 64, stream)
        assert torch.equal(out, want.mT if transposed else want)


MASKS = ("none", "causal", "causal, offset", "padding", "bool", "float", "window")
WITHOUT_NOISE = ("none", "causal, offset", "float")


@inside
@pytest.mark.parametrize(
    ("arm", "mask"), [(arm, mask) for arm in ARMS for mask in (MASKS if arm in ("soft", "st") else WITHOUT_NOISE)]
)
def test_kernels_are_the_reference(arm: str, mask: str) -> None:
    """Grouped heads, ragged lengths, a temperature for each head, head dims 16 and 24."""
    numbers = {"tau": torch.tensor([0.4, 0.9])}
    if ARMS[arm]["noise"] == "gumbel":
        numbers["noise_scale"] = torch.tensor([1.0, 0.5])
    compare(leaves() | numbers | {"seed": 5} | mask_of(mask) | ARMS[arm], 5e-4 if "noise_scale" in numbers else 1e-5)


@inside
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("d", "dv", "tau"), [(40, 40, 10.0), (64, 16, 0.02), (5, 33, 1.0)])
def test_head_dimensions_and_temperatures(arm: str, d: int, dv: int, tau: float) -> None:
    """At tau 0.02 the noise's own error, 5e-5, is 50 times larger in Z."""
    compare(leaves(d, dv) | {"tau": tau, "seed": 3} | ARMS[arm], 5e-3 if ARMS[arm]["noise"] == "gumbel" else 1e-4)


@inside
@pytest.mark.parametrize("arm", ARMS)
def test_dropout(arm: str) -> None:
    compare(leaves() | {"seed": 2, "dropout_p": 0.3} | mask_of("padding") | ARMS[arm], 5e-4)


@inside
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(arm: str, dtype: torch.dtype) -> None:
    """Errors are of the order of the dtype's rounding of inputs' products: statistics are in float32."""
    compare(leaves(dtype=dtype) | {"seed": 3} | ARMS[arm], 8 * torch.finfo(dtype).eps)


@inside
def test_a_large_common_gradient_costs_no_precision() -> None:
    """dP far larger than its differences: the sums of a hard choice are relative to a guess of delta."""
    arguments = leaves(dtype=torch.bfloat16) | {"seed": 3, "hard": True}
    arguments["value"] = arguments["value"] * 0.25 + 8.0  # type: ignore[operator]
    d_out = torch.randn(1, 2, LQ, 24, dtype=torch.bfloat16)
    got, want = (f(arguments, ["query", "key"], d_out) for f in (
        lambda *x: gradients(kernels.attention, *x), exact
    ))  # fmt: skip
    for a, b in zip(got[1:], want[1:], strict=True):
        assert (a.double() - b).norm() <= 0.02 * b.norm()


@inside
def test_a_seed_for_each_example_and_a_shard_of_heads() -> None:
    q, k = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 7, 16)
    for more in ({"seed": torch.tensor([5, -9])}, {"seed": 5, "h_offset": 3, "h_total": 8}):
        problem = attention_problem(q, k, k, hard=True, **more)  # type: ignore[arg-type]
        assert torch.equal(kernels.attention(problem), reference.attention(problem).output)


@inside
@pytest.mark.parametrize("hard", [False, True])
def test_nan_in_padding_never_reaches_an_output_or_gradient(hard: bool) -> None:
    keep = mask_of("padding")["attn_mask"]
    assert isinstance(keep, Tensor)
    arguments = leaves() | {"hard": hard, "attn_mask": keep, "tau": torch.ones(2), "seed": 1}
    for name in ("key", "value"):
        arguments[name] = arguments[name].masked_fill(~keep.mT, math.nan)  # type: ignore[attr-defined]
    results = gradients(kernels.attention, arguments, ["query", "key", "value", "tau"], torch.ones(1, 2, LQ, 24))
    assert all(x.isfinite().all() for x in results)


@inside
@pytest.mark.parametrize("hard", [False, True])
def test_a_row_that_sees_nothing_gives_zero(hard: bool) -> None:
    keep = torch.zeros(1, 1, LQ, LK, dtype=torch.bool)
    arguments = leaves() | {"hard": hard, "attn_mask": keep, "tau": torch.full((2,), 0.01)}
    results = gradients(kernels.attention, arguments, ["query", "key", "value", "tau"], torch.ones(1, 2, LQ, 24))
    assert all((x == 0).all() for x in results)


@inside
def test_strided_inputs_and_no_gradient() -> None:
    q, k, v = (torch.randn(1, length, 2, 16).transpose(1, 2) for length in (LQ, LK, LK))
    want = reference.attention(attention_problem(q, k, v, noise="none")).output
    for x in (k, k.mT.contiguous().mT):
        torch.testing.assert_close(kernels.attention(attention_problem(q, x, v, noise="none")), want)


@inside
def test_second_derivatives_are_refused() -> None:
    x = torch.randn(1, 1, 3, 16, requires_grad=True)
    total = kernels.attention(attention_problem(x, x, x)).sum()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(total, x, create_graph=True)


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
def test_what_the_kernels_lack_is_named(more: dict[str, object], reason: str) -> None:
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
