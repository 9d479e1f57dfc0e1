"""What the conformance tests share: cases, the exact answer, the error that is allowed, and the rows left out.

An implementation solves a case in a dtype; the reference solves it in float64 on the same numbers and the same noise,
always on the CPU, and once more in the case's dtype to see what error that dtype brings. On a machine with CUDA all
but the CPU kernels run there, the Triton kernels compiled; elsewhere those run under Triton's interpreter, in a
process that has TRITON_INTERPRET=1.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gumbel_attention import noise
from gumbel_attention.arguments import attention_problem, takes_part
from gumbel_attention.dispatch import IMPLEMENTATIONS
from gumbel_attention.impl import blockwise, reference
from gumbel_attention.impl.cpu import build
from gumbel_attention.impl.problem import AttentionProblem
from half_precision import rounded_products
from interpreter import INTERPRETING
from tally import SHARE, TALLY

Arguments = dict[str, object]

CUDA = torch.cuda.is_available() and not INTERPRETING

NAMES = tuple(name for name in IMPLEMENTATIONS if name != "reference")
ARMS: dict[str, Arguments] = {
    "soft": {"noise": "gumbel"},
    "st": {"noise": "gumbel", "hard": True},
    "det-st": {"noise": "none", "hard": True},
    "softmax": {"noise": "none"},
    "normal-st": {"noise": "normal", "hard": True},
}
MASKS = ("none", "causal", "causal, offset", "padding", "bool", "float", "window")
TAUS = (0.01, 0.7, 10.0)
HALF = (torch.bfloat16, torch.float16)
DTYPES = {
    "sdpa": (torch.float64, torch.float32, *HALF),
    "triton": (torch.float32, *HALF),
    "cpu": (torch.float32, *HALF),
    "blockwise": (torch.float64, torch.float32, *HALF),
}
MATRIX_UNITS = ("sdpa", "triton")
"""Implementations that round what enters a product of matrices to half precision, as the units for it want."""
MASK_GRADIENT = ("sdpa", "blockwise")
"""Implementations that give a float mask its gradient."""

GAPS: dict[str, dict[str, Callable[[AttentionProblem], bool]]] = {
    "sdpa": {
        "it has neither noise nor a hard choice": lambda p: p.choice.hard or p.choice.noise != "none",
        "it has neither softcap nor sinks": lambda p: p.softcap is not None or p.sinks is not None,
        "its dropout cannot repeat a given seed": lambda p: p.dropout_p > 0.0,
    },
    "triton": {
        "triton is not installed": lambda p: importlib.util.find_spec("triton") is None,
        "there is no CUDA device": lambda p: not CUDA and not INTERPRETING,
        "they have no normal noise": lambda p: p.choice.noise == "normal",
        "they have no soft cap": lambda p: p.softcap is not None,
        "they have no sinks": lambda p: p.sinks is not None,
        "offsets must be ints": lambda p: isinstance(p.q_offset, Tensor) or isinstance(p.k_offset, Tensor),
    },
    "cpu": {
        "no C++ compiler": lambda p: build._compiler() is None,
        "it draws Gumbel noise only": lambda p: p.choice.noise == "normal",
        "it has no softcap": lambda p: p.softcap is not None,
        "it has no sinks": lambda p: p.sinks is not None,
        "its q_offset and k_offset are ints": lambda p: (
            isinstance(p.q_offset, Tensor) or isinstance(p.k_offset, Tensor)
        ),
    },
    "blockwise": {},
}
"""The only reasons for which a case is skipped: how they begin, and the problems for which they hold."""

NOISE_ERROR: dict[str, Callable[[Tensor], Tensor]] = {
    "sdpa": torch.zeros_like,
    "triton": lambda word: triton_noise_error(word),
    "cpu": lambda word: 3e-7 * (1.0 + noise.gumbel(word).abs()),
    "blockwise": lambda word: 1e-7 * (1.0 + noise.gumbel(word).abs()),
}
"""How far an implementation's Gumbel of a word may be from the exact one, in float32; tested for each by itself."""
TRITON_NOISE = 7e-5
"""Error of the fast Gumbel in the upper half: 5.5e-5 by its formula, and what lg2.approx adds, 2^-22 near 1."""


class Sizes(NamedTuple):
    """Shapes of a case."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 21
    k_len: int = 27
    d: int = 8
    d_v: int = 5


INTERPRETED = Sizes(1, 2, 1, 21, 37, 16, 24)
"""Two tiles of queries in the column kernel, three of keys in the others."""


def sizes_of(name: str) -> Sizes:
    return INTERPRETED if thinned(name) else Sizes()


def thinned(name: str) -> bool:
    """Whether cases of this implementation are chosen for what they cover, as each takes a second or more."""
    return name == "triton" and not CUDA


def device_of(name: str) -> torch.device:
    return torch.device("cuda" if CUDA and name != "cpu" else "cpu")


def triton_noise_error(word: Tensor) -> Tensor:
    """1 - v is off by up to 6e-7, which counts where it is small: at the low end of the noise."""
    v = noise.uniform(word)
    return TRITON_NOISE + torch.where(v > 0.5, -torch.log(-torch.log1p(-v + 6e-7)) - noise.gumbel(word), 0.0)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def mask_of(kind: str, sizes: Sizes = Sizes()) -> Arguments:  # noqa: B008 a tuple
    """Mask arguments, with rows that see nothing where the kind allows it."""
    batch, heads, _, q_len, k_len, _, _ = sizes
    if kind == "padding":
        keep = torch.ones(batch, 1, 1, k_len, dtype=torch.bool)
        keep[0, ..., 3 * k_len // 4 :] = keep[-1, ..., : k_len // 5] = False
        return {"attn_mask": keep}
    if kind == "bool":
        keep = torch.rand(batch, heads, q_len, k_len) > 0.5
        keep[0, heads // 2, q_len // 7] = keep[-1, :, q_len - 1] = False
        return {"attn_mask": keep}
    if kind == "float":
        bias = torch.randn(heads, q_len, k_len).masked_fill(torch.rand(q_len, k_len) > 0.8, -math.inf)
        bias[:, q_len // 3] = -math.inf
        return {"attn_mask": bias}
    if kind == "window":
        distance = torch.arange(q_len)[:, None] - torch.arange(k_len)
        return {"attn_mask": (distance >= 0) & (distance < 5)}
    offsets = {"q_offset": 21, "k_offset": 17} if kind == "causal, offset" else {}
    return {"is_causal": kind.startswith("causal"), **offsets}


def case(name: str, arm: str, mask: str, tau: float, dtype: torch.dtype, **more: object) -> Arguments:
    """Grouped heads and ragged lengths; a temperature and a scale of the noise for each head; leaves of ``dtype``."""
    sizes = sizes_of(name)
    batch, heads, kv_heads, q_len, k_len, d, d_v = sizes
    arguments: Arguments = {
        "query": leaf(batch, heads, q_len, d), "key": leaf(batch, kv_heads, k_len, d),
        "value": leaf(batch, kv_heads, k_len, d_v), "tau": torch.full((heads,), tau, requires_grad=True),
        "enable_gqa": True, "seed": 5, **mask_of(mask, sizes), **ARMS[arm],
    }  # fmt: skip
    if ARMS[arm]["noise"] != "none":
        arguments["noise_scale"] = torch.tensor([0.8, 1.0, 0.0, 2.0])[:heads].requires_grad_()
    if name == "sdpa" and dtype in HALF:
        arguments["tau"] = tau  # a tensor divides the query, which is rounded then: see test_half_precision
    arguments |= more
    bias = arguments.get("attn_mask")
    if isinstance(bias, Tensor) and bias.is_floating_point():
        bias.requires_grad_(name in MASK_GRADIENT)
    return moved(arguments, dtype)


def moved(arguments: Arguments, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Arguments:
    """The arguments with fresh leaves elsewhere; numbers for each head stay float32 beside half precision."""

    def move(name: str, x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        wanted = x.dtype if dtype is None or not x.is_floating_point() else dtype
        if wanted in HALF and name in ("tau", "noise_scale", "sinks"):
            wanted = torch.float32
        if (
            name == "attn_mask" and wanted != x.dtype
        ):  # its lowest number stands for -inf, and that depends on the dtype
            x = x.masked_fill(~takes_part(x), -math.inf)
        return x.detach().to(device or x.device, wanted).requires_grad_(x.requires_grad)

    return {name: move(name, x) for name, x in arguments.items()}


def skip_if_unable(name: str, arguments: Arguments) -> None:
    """Skips what the implementation has never been able to do; what it no longer can is a failure."""
    problem = attention_problem(**moved(arguments, device=device_of(name)))  # type: ignore[arg-type]
    reason = IMPLEMENTATIONS[name].unsupported(problem)
    if reason is None:
        return
    known = any(reason.startswith(start) and holds(problem) for start, holds in GAPS[name].items())
    assert known, f"impl={name!r} has lost a capability: {reason}"
    pytest.skip(f"{name}: {reason}")


def attend(name: str, arguments: Arguments) -> Tensor:
    """The output on the CPU; blockwise in blocks of eight queries."""
    problem = attention_problem(**moved_to(device_of(name), arguments))  # type: ignore[arg-type]
    if name != "blockwise":
        return IMPLEMENTATIONS[name].attention(problem).cpu()
    batch, heads, _, _ = problem.query.shape
    return blockwise.attention(problem, batch * heads * problem.key.shape[-2] * 8).cpu()


def moved_to(device: torch.device, arguments: Arguments) -> Arguments:
    """The arguments on a device, by operations that gradients pass."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def leaves(arguments: Arguments) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}


def results(name: str, arguments: Arguments, d_out: Tensor | None = None) -> dict[str, Tensor]:
    """The output, and the gradient of each leaf by the leaf's name."""
    arguments = moved(arguments)
    out = attend(name, arguments)
    asked = leaves(arguments)
    if d_out is None:
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(out, list(asked.values()), d_out.to(out.dtype))
    return {"output": out.detach()} | dict(zip(asked, gradients, strict=True))


def check(name: str, arguments: Arguments, *, cancelled: bool = False) -> None:
    """Output and all gradients against float64, over the rows whose choice rounding cannot change.

    Errors are relative to the largest entry. In half precision they are at most twice the reference's in that dtype.
    In float32 at most three times, or what rounding of the scores makes of it after division by tau; the error of the
    noise is divided by tau as well. ``cancelled`` allows for gradients that are next to nothing, in any shape.
    """
    skip_if_unable(name, arguments)
    q, v = arguments["query"], arguments["value"]
    assert isinstance(q, Tensor)
    assert isinstance(v, Tensor)
    d_out = torch.randn(*q.shape[:-1], v.shape[-1], generator=torch.Generator().manual_seed(1)).to(q.dtype)
    clear = torch.ones(q.shape[:-1], dtype=torch.bool)
    if arguments.get("hard"):
        clear = check_choices(name, arguments)
    d_out = d_out * clear[..., None]
    got = results(name, arguments, d_out)
    want = results("reference", moved(arguments, torch.float64), d_out)
    units = q.dtype in HALF and name in MATRIX_UNITS
    same = results("reference", arguments, d_out)
    if units:
        same = rounded_products(arguments, d_out, truncate=INTERPRETING)
    for label, exact in want.items():
        ours, bound = got[label], same[label]
        assert ours.isfinite().all(), label
        assert ours.dtype == bound.dtype, label
        if label == "output":
            ours, bound, exact = (x * clear[..., None] for x in (ours, bound, exact))
            assert not ours[(exact == 0.0).all(-1)].any(), "rows that see nothing, or whose weight is dropped"
        if exact.dtype == ours.dtype:
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10, msg=lambda text, x=label: f"{x}: {text}")
            continue
        size = exact.abs().max().clamp(min=0.1)  # exact zeros get rounding errors
        error, theirs = ((x.double() - exact).abs().max() / size for x in (ours, bound))
        floor = _floor(name, arguments, q.dtype, ours.dtype)
        if cancelled:
            floor += _cancellation(label, arguments, d_out) / size.item()
        allowed = max(floor, (2.0 if ours.dtype in HALF else 3.0) * theirs)
        assert error <= allowed, f"{label}: error {error:.2e}, allowed {allowed:.2e}, the reference's {theirs:.2e}"


def _floor(name: str, arguments: Arguments, dtype: torch.dtype, result: torch.dtype) -> float:
    """The error allowed whatever the reference's own, to a result of a case in ``dtype``."""
    tau, scale = (torch.as_tensor(arguments.get(x, 1.0)).detach() for x in ("tau", "noise_scale"))
    floor = 0.0 if result in HALF else 1e-5 + 1e-6 / tau.min().item()
    if name == "triton" and arguments.get("noise", "gumbel") == "gumbel":
        floor += 2.0 * TRITON_NOISE * (scale / tau).max().item()
    if dtype in HALF and result not in HALF and name in MATRIX_UNITS:
        floor += 4.0 * torch.finfo(dtype).eps  # a few sums: the reference's own error may be small by chance
    return floor


def _cancellation(label: str, arguments: Arguments, d_out: Tensor) -> float:
    """The error in a gradient that has cancelled, as where one key has all the weight: dP - delta errs by a rounding.

    dP is sent on divided by tau, times the keys or the queries; sums over rows add up as sums of random signs.
    """
    problem = attention_problem(**moved(arguments, torch.float32))  # type: ignore[arg-type]
    q, k, v = problem.query.detach(), problem.key.detach(), problem.value.detach()
    d_weights = d_out.abs().max() * v.nan_to_num().abs().max() * v.shape[-1]
    tau = torch.as_tensor(problem.choice.tau).detach().min()
    rows = math.sqrt(q[..., 0].numel())
    logits = q.abs().max() * k.nan_to_num().abs().max() * q.shape[-1] * abs(problem.scale) + 5.0
    spread = {
        "query": k.nan_to_num().abs().max() * problem.scale, "key": q.abs().max() * problem.scale * rows,
        "tau": rows * logits / tau, "noise_scale": rows * 5.0, "sinks": rows, "attn_mask": rows,
    }.get(label, 0.0)  # fmt: skip
    return float(torch.finfo(torch.float32).eps * d_weights / tau * spread)


def check_choices(name: str, arguments: Arguments) -> Tensor:
    """Every clear row takes the key that the reference takes in float64. Returns which rows are clear, (B, H, Lq)."""
    exact = reference.attention(attention_problem(**moved(arguments, torch.float64)))  # type: ignore[arg-type]
    clear = clear_rows(name, arguments)
    TALLY.add(name, clear)
    assert (~clear).sum() <= max(1.0, SHARE * clear.numel())
    assert exact.indices is not None
    assert exact.weights is not None
    want = torch.where(exact.weights.sum(-1) > 0.0, exact.indices, -1)
    assert torch.equal(chosen_keys(name, arguments)[clear], want[clear])
    return clear


def chosen_keys(name: str, arguments: Arguments) -> Tensor:
    """(B, H, Lq): the key that each query takes, read off values that name their key; -1 for none, and if dropped."""
    key = arguments["key"]
    assert isinstance(key, Tensor)
    number = torch.arange(1, key.shape[-2] + 1)
    digits = torch.stack([number // 64, number % 64], dim=-1)  # exact in every dtype up to 64 * 64 keys
    with torch.no_grad():
        out = attend(name, arguments | {"value": digits.to(key.dtype).expand(*key.shape[:-1], 2)})
    survivor = 1.0 - float(arguments.get("dropout_p", 0.0))  # type: ignore[arg-type]
    read = (out.double() * survivor).round().long()
    return read[..., 0] * 64 + read[..., 1] - 1


def clear_rows(name: str, arguments: Arguments) -> Tensor:
    """(B, H, Lq): rows whose best key is ahead of all others by more than the errors of both, or that see one or none.

    An error is at most that of the product's sum, D roundings of its absolute terms, a few roundings of the logit,
    and that of the noise. Rows are those of the logits before division by tau, which keeps their order.
    """
    problem = attention_problem(**moved(arguments, torch.float64))  # type: ignore[arg-type]
    q, choice = problem.query, problem.choice
    k = problem.hidden_keys_and_values()[0].repeat_interleave(q.shape[1] // problem.key.shape[1], dim=1)
    dtype = getattr(arguments["query"], "dtype", torch.float32)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    z = q @ k.mT * problem.scale
    error = eps * q.shape[-1] * (q.abs() @ k.abs().mT) * abs(problem.scale)
    if problem.softcap is not None:
        z = problem.softcap * torch.tanh(z / problem.softcap)
    if problem.bias is not None:
        z = z + problem.bias
    if choice.noise != "none":
        assert choice.where is not None
        scale = torch.as_tensor(choice.noise_scale)
        z = z + scale * noise.sample(choice.noise, choice.where)
        if dtype != torch.float64 and choice.noise == "gumbel":
            error = error + scale * NOISE_ERROR[name](choice.where.words(noise.STREAM_NOISE))
    error = error + 8.0 * eps * (1.0 + z.abs())
    if problem.sinks is not None:
        column = _sink_logits(problem, z)
        z = torch.cat([z, column], dim=-1)
        error = torch.cat([error, 16.0 * eps * (1.0 + column.abs())], dim=-1)
    visible = problem.visible()
    if visible is not None:
        seen = visible.expand(q.shape[:-1] + k.shape[-2:-1])
        seen = torch.nn.functional.pad(seen, (0, z.shape[-1] - seen.shape[-1]), value=True)
        z, error = z.masked_fill(~seen, -math.inf), error.masked_fill(~seen, 0.0)
    best = z.argmax(-1, keepdim=True)
    others = (z + error).scatter(-1, best, -math.inf).amax(-1)
    floor = z.gather(-1, best)[..., 0] - error.gather(-1, best)[..., 0]
    return (others == -math.inf) | (floor > others)


def _sink_logits(problem: AttentionProblem, z: Tensor) -> Tensor:
    choice = problem.choice
    assert problem.sinks is not None
    column = problem.sinks[None, :, None, None].expand(*z.shape[:-1], 1)
    if choice.noise == "none":
        return column
    assert choice.where is not None
    return column + torch.as_tensor(choice.noise_scale) * noise.sample(choice.noise, choice.where, sink=True)
