"""Threads of the native CPU kernels share their sums: no copies of gradients, no wait without end, the same bits."""

import itertools
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gumbel_attention.arguments import attention_problem
from gumbel_attention.impl import cpu
from gumbel_attention.impl.cpu import build
from harness import fresh
from harness.contenders import contender_named
from harness.memory import contender_memory

COMPILER = build._compiler()
UNAVAILABLE = cpu.available()
needs_kernels = pytest.mark.skipif(UNAVAILABLE is not None and COMPILER is None, reason=f"{UNAVAILABLE}")
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
CPU = torch.device("cpu")
THREADS = (1, 2, 3, 4, 7)
Arguments = dict[str, object]


@pytest.fixture(autouse=True)
def threads_are_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gradients(shape: tuple[int, ...], threads: int, seed: int = 0, **settings: object) -> list[Tensor]:
    """Output and gradients of a problem (batch, heads, kv heads, queries, keys, D, Dv) drawn from the seed."""
    torch.set_num_threads(threads)
    draw = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, q_len, k_len, dim, v_dim = shape
    sizes = [(batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, v_dim)]
    leaves = [torch.randn(size, generator=draw).requires_grad_() for size in sizes]
    tau, scale = torch.linspace(0.5, 1.5, heads).requires_grad_(), torch.ones(heads, requires_grad=True)
    q, k, v = leaves
    arguments: Arguments = {
        "query": q, "key": k, "value": v, "tau": tau, "noise_scale": scale, "seed": seed,
        "enable_gqa": heads != kv_heads,
    }  # fmt: skip
    output = cpu.attention(attention_problem(**(arguments | settings)))  # type: ignore[arg-type]  # by name
    weights = torch.randn(output.shape, generator=draw)
    return [output, *torch.autograd.grad(output, [*leaves, tau, scale], weights)]


def extra_memory(name: str, length: int) -> int:
    """Bytes of one forward and backward pass, one head of 64 dimensions."""
    return contender_memory(contender_named(name, CPU), "forward+backward", 1, length, 64, False, CPU, torch.float32)


@needs_kernels
@needs_proc
def test_memory_is_that_of_the_attention_of_torch() -> None:
    """A second copy of dK and dV would add 2 MiB: 1.3 times as much (soft), 1.55 (hard, with a buffer per thread)."""
    torch.set_num_threads(2)
    length = 4096
    torchs = extra_memory("sdpa", length)
    results = 4 * length * 64 * 4
    for arm, bar in (("gumbel-soft", 1.15), ("gumbel-st", 1.35)):
        assert results < extra_memory(f"cpu {arm}", length) < bar * torchs, arm


def growth(rows: int) -> int:
    """Bytes that 8192 positions take more than 2048, beside the output, three gradients and rows held on purpose."""
    longer, shorter = (
        fresh.call("memory_control:attend", length, rows) - 4 * length * 64 * 4 for length in (8192, 2048)
    )
    return longer - shorter


@needs_kernels
@needs_proc
def test_memory_beside_the_results_does_not_grow_with_length() -> None:
    """Linux counts to within 0.8 MB; the control, 192 rows of scores held beside the same pass, adds 4.5 MiB."""
    assert growth(rows=0) < 2**21 < growth(rows=192)


CASES: list[tuple[tuple[int, ...], Arguments]] = [
    ((1, 1, 1, 700, 1100, 8, 8), {}),
    ((1, 1, 1, 1300, 1300, 16, 16), {"is_causal": True}),
    ((2, 6, 2, 333, 333, 16, 24), {"is_causal": True}),
    ((1, 4, 1, 200, 1033, 8, 8), {"is_causal": True, "q_offset": 900, "k_offset": 7}),
    ((1, 2, 2, 90, 700, 8, 8), {"is_causal": True, "k_offset": 40}),  # the first rows see no key
    ((1, 2, 1, 150, 600, 8, 8), {"attn_mask": torch.arange(600) % 5 != 0, "dropout_p": 0.2}),
    ((3, 1, 1, 17, 5, 4, 4), {}),
    ((1, 1, 1, 40, 4300, 8, 8), {"dropout_p": 0.1}),  # more tiles than one thread keeps
]


@needs_kernels
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_bits_do_not_depend_on_the_number_of_threads(case: int, hard: bool) -> None:
    shape, settings = CASES[case]
    one = gradients(shape, 1, hard=hard, **settings)
    for threads, _ in itertools.product(THREADS, range(3)):
        for got, expected in zip(gradients(shape, threads, hard=hard, **settings), one, strict=True):
            assert torch.equal(got, expected), threads


@needs_kernels
@pytest.mark.parametrize("hard", [False, True])
def test_many_small_problems_with_more_threads_than_cores(hard: bool) -> None:
    shapes = [(1, 1, 1, 100, 520, 4, 4), (1, 2, 1, 64, 64, 4, 4), (2, 3, 3, 33, 7, 4, 4), (1, 1, 1, 1, 1, 4, 4)]
    expected = {shape: gradients(shape, 1, hard=hard, is_causal=True) for shape in shapes}
    for _, shape in itertools.product(range(100), shapes):
        for x, y in zip(gradients(shape, 8, hard=hard, is_causal=True), expected[shape], strict=True):
            assert torch.equal(x, y), shape


@needs_kernels
def test_two_calls_at_once_do_not_disturb_each_other() -> None:
    shape = (1, 2, 1, 300, 700, 8, 8)
    expected, results = gradients(shape, 2), {}

    def work(name: int) -> None:
        results[name] = [gradients(shape, 2) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in itertools.chain(*results.values()):
        assert all(map(torch.equal, got, expected))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_turns_keep_the_order_and_end_when_a_thread_fails(tmp_path: Path) -> None:
    """Threads that are not OpenMP's, delayed at random; in every second round one of them throws while others wait."""
    assert COMPILER is not None
    source, program = Path(__file__).with_name("turns.cpp"), tmp_path / "turns"
    folder = Path(build.__file__).parent
    subprocess.run(
        [*COMPILER, "-std=c++20", "-O1", "-pthread", f"-I{folder}", str(source), "-o", str(program)], check=True
    )
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
