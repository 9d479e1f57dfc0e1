"""The native CPU kernels by themselves: words, logarithms, operators, refusals, memory. Values are compared with the
reference in the conformance tests.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gumbel_attention import noise
from gumbel_attention.arguments import attention_problem
from gumbel_attention.impl import cpu
from gumbel_attention.impl.cpu import build

UNAVAILABLE = cpu.available()
COMPILER = build._compiler()
needs_kernels = pytest.mark.skipif(UNAVAILABLE is not None and COMPILER is None, reason=f"{UNAVAILABLE}")
ops = torch.ops.gumbel_attention
Arguments = dict[str, object]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def solve(**arguments: object) -> Tensor:
    return cpu.attention(attention_problem(**arguments))  # type: ignore[arg-type]


@needs_kernels
def test_the_kernels_compile() -> None:
    assert UNAVAILABLE is None


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
