"""The Triton kernels as torch operators: compilers, odd layouts, refusals and failures, under Triton's interpreter.

The interpreter is chosen by an environment variable before triton is imported, for good: the tests here run in a
process of their own, which one of them starts.
"""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gumbel_attention as ga
from gumbel_attention.arguments import attention_problem
from gumbel_attention.impl import reference
from gumbel_attention.impl import triton as kernels
from gumbel_attention.impl.triton import device
from interpreter import INTERPRETER_WARNINGS, INTERPRETING, run_interpreted

inside = pytest.mark.skipif(not INTERPRETING, reason="runs in a process of its own, under Triton's interpreter")
both = pytest.mark.parametrize("hard", [False, True])
pytestmark = INTERPRETER_WARNINGS
ops = torch.ops.gumbel_attention


@pytest.mark.skipif(INTERPRETING, reason="this is that process")
@pytest.mark.slow
def test_operators_in_a_process_of_their_own() -> None:
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def solve(*qkv: Tensor, **settings: Any) -> Tensor:
    return kernels.attention(attention_problem(*qkv, **settings))


def expected(*qkv: Tensor, **settings: Any) -> Tensor:
    return reference.attention(attention_problem(*qkv, **settings)).output


def operator_arguments(hard: bool, *, grad: bool = True, masked: bool = True, length: int = 20) -> tuple[Any, ...]:
    q, k, v = (torch.randn(1, 2, length, 8, requires_grad=grad) for _ in range(3))
    tau, scale = (torch.ones(2, requires_grad=grad) for _ in range(2))
    keep = torch.rand(length, length)[None, None] > 0.2 if masked else None
    return q, k, v, tau, scale, torch.tensor(3), keep, None, 0.5, True, 0, 0, hard, True, 0.1, 0, 2


@inside
@both
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operators_pass_opcheck(hard: bool) -> None:
    torch.library.opcheck(ops.triton_forward.default, operator_arguments(hard, length=5))
    arguments = operator_arguments(hard, grad=False, length=5)
    output, rows = ops.triton_forward(*arguments)
    for wanted in ([True] * 5, [True, False, True, False, True]):
        gradient = (torch.randn_like(output), None if hard else output, rows, wanted)
        torch.library.opcheck(ops.triton_backward.default, (*gradient, *arguments))


@inside
@both
def test_compiled_and_checkpointed_gradients_are_those_of_eager(hard: bool) -> None:
    """The whole call in one graph, the draw of its seed included."""
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    tau, noise_scale = torch.tensor([0.5, 1.5], requires_grad=True), torch.ones(2, requires_grad=True)

    def loss(*x: Tensor) -> Tensor:
        query, tau, noise_scale = x
        return ga.gumbel_attention(
            query, query, query, tau=tau, noise_scale=noise_scale, hard=hard, is_causal=True, dropout_p=0.1,
            impl="triton",
        ).square().sum()  # fmt: skip

    results = []
    for f in (
        loss,
        lambda *x: checkpoint(loss, *x, use_reentrant=False),
        torch.compile(loss, backend="aot_eager", fullgraph=True),
    ):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(f(x, tau, noise_scale), (x, tau, noise_scale)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@inside
def test_new_numbers_compile_nothing_anew() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    q = torch.randn(1, 1, 3, 8)

    @torch.compile(backend=counter, fullgraph=True)
    def attend(tau: Tensor, noise_scale: Tensor, seed: Tensor) -> Tensor:
        return ga.gumbel_attention(q, q, q, tau=tau, noise_scale=noise_scale, seed=seed, impl="triton")

    for numbers in ((1.0, 1.0, 5), (0.3, 0.7, -6)):
        tau, noise_scale, seed = (torch.tensor(x) for x in numbers)
        want = expected(q, q, q, tau=tau, noise_scale=noise_scale, seed=seed)
        torch.testing.assert_close(attend(tau, noise_scale, seed), want, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@inside
def test_numbers_reach_kernels_by_pointer() -> None:
    """A launch with another tau, noise_scale or seed differs in tensors only: triton compiles nothing for it."""
    from gumbel_attention.impl.triton import launch

    q = torch.randn(1, 2, 3, 8)
    first, second = (
        launch.common_arguments(attention_problem(q, q, q, tau=tau, noise_scale=noise_scale, seed=seed))
        for tau, noise_scale, seed in ((1.0, 1.0, 1), (0.5, 0.3, -7))
    )
    differing = {name for name in first if not isinstance(first[name], Tensor) and first[name] != second[name]}
    assert not differing
    assert isinstance(first["tau_ptr"], Tensor)


@inside
@both
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_reads_a_tensors_value(hard: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values raise where one is read; so no launch synchronises, and a CUDA graph may hold it."""
    from gumbel_attention.impl.triton import launch

    launched = []
    monkeypatch.setattr(launch, "_launch", lambda kernel, *rest, **more: launched.append(kernel))
    arguments = [x.to("meta") if isinstance(x, Tensor) else x for x in operator_arguments(hard, masked=masked)]
    problem = kernels.ops._problem(*arguments)
    output, rows = launch.forward(problem)
    gradients = launch.backward(problem, None if hard else output, rows, torch.empty_like(output), [True] * 5)
    assert len(launched) == 3
    assert [None if x is None else x.shape for x in gradients] == [x.shape for x in arguments[:5]]
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(arguments[3][0] > 0)  # what the test relies on


@inside
@both
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize(("batch", "q_len", "k_len"), [(0, 4, 4), (2, 0, 4)])
def test_empty_tensors(hard: bool, offset: int, batch: int, q_len: int, k_len: int) -> None:
    q = torch.randn(batch, 2, q_len, 8, requires_grad=True)
    k, v = (torch.randn(batch, 1, k_len, d, requires_grad=True) for d in (8, 5))
    tau = torch.ones(2, requires_grad=True)
    output = solve(q, k, v, enable_gqa=True, tau=tau, hard=hard, seed=1, q_offset=offset, k_offset=offset)
    assert output.shape == (batch, 2, q_len, 5)
    gradients = torch.autograd.grad(output.sum(), (q, k, v, tau))
    assert all((x == 0).all() for x in (output, *gradients))


@inside
@both
def test_layouts_and_gradients_of_any_strides(hard: bool) -> None:
    """Transposed, reversed, sliced and expanded tensors, masks of stride 0, and a gradient that is one number."""
    q = torch.randn(2, 5, 2, 8).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 2, 8, 7).mT.requires_grad_()
    v = torch.randn(1, 1, 7, 16)[..., ::2].expand(2, 2, 7, 8)
    mask = (torch.rand(5, 1) > 0.3).expand(2, 1, 5, 7)
    for more in ({}, {"attn_mask": mask}, {"attn_mask": torch.randn(14, 5)[::2].T.expand(2, 2, 5, 7)}):
        settings = {"hard": hard, "seed": 1} | more
        got, want = (f(q, k, v, **settings) for f in (solve, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k)) for x in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@inside
def test_rows_that_lie_far_apart_are_copied() -> None:
    from gumbel_attention.impl.triton import launch

    def addressable(row: int, column: int = 1) -> Tensor:
        return launch._addressable(torch.empty_strided((1, 1, 3, 8), (0, 0, row, column), device="meta"))

    assert addressable(2**24 - 1).stride(2) == 2**24 - 1
    assert addressable(2**24).stride(2) == addressable(16, 2).stride(2) == 8


@inside
@both
def test_second_derivatives_and_vmap_are_refused(hard: bool) -> None:
    x = torch.randn(1, 1, 3, 8, requires_grad=True)
    gradient = torch.autograd.grad(solve(x, x, x, hard=hard).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(gradient.sum(), x)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda q: solve(q, x, x, hard=hard, seed=1))(torch.randn(3, 1, 1, 3, 8))


class Failing:
    """A kernel that cannot be compiled or started."""

    arg_names = ("q_ptr",)
    fn = SimpleNamespace(__name__="forward_kernel")

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, grid: object) -> Any:
        def run(**arguments: object) -> None:
            raise self.error

        return run


@inside
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda triton: triton.runtime.errors.OutOfResources(300000, 232448, "shared memory"), "300000"),
        (lambda triton: triton.runtime.errors.PTXASError("no instruction of that name"), "no instruction"),
        (lambda triton: triton.compiler.errors.CompilationError("source", None, "cannot broadcast"), "cannot broad"),
        (lambda triton: RuntimeError("Failed to find C compiler."), "C compiler"),
        (lambda triton: subprocess.CalledProcessError(1, ["cc", "main.c"]), "main.c"),
    ],
)
def test_a_kernel_that_fails_names_another_implementation(
    error: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    from gumbel_attention.impl.triton import launch

    q = torch.randn(1, 1, 3, 8, requires_grad=True)
    cause = error(triton)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "forward_kernel", Failing(cause))
        with pytest.raises(RuntimeError, match="impl='blockwise'") as caught:
            solve(q, q, q)
    assert caught.value.__cause__ is cause
    for part in ("forward_kernel", "float32", message):
        assert part in str(caught.value)
    solve(q, q, q).sum().backward()  # nothing stays broken


@inside
def test_available_says_why_triton_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    unavailable = device.unavailable.__wrapped__
    assert unavailable() is None
    monkeypatch.setattr(device, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in unavailable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    no_compiler = SimpleNamespace(get_current_target=lambda: exec("raise RuntimeError('Failed to find C compiler.')"))
    monkeypatch.setattr(triton.runtime.driver, "_active", no_compiler)
    assert "C compiler" in unavailable()
    monkeypatch.setattr(importlib, "import_module", lambda *x: exec("raise ImportError('libtriton.so: no such file')"))
    assert "libtriton.so" in unavailable()


def test_available_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert device.unavailable.__wrapped__() == "triton is not installed"


def test_importing_the_operators_imports_no_compiler() -> None:
    heavy = "[m for m in ('triton', 'torch._dynamo', 'torch._inductor') if m in sys.modules]"
    code = f"import sys, gumbel_attention.impl.triton.ops; sys.exit(', '.join({heavy}) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
