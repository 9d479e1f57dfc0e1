"""Whether the implementations are right: output and gradients against the reference in float64, on the same noise."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gumbel_attention as ga
from harness import fresh
from harness.contenders import ARMS

LONGEST_CHECK = 300.0
"""Seconds that one method may take, compiling included."""
FLIPPED_SHARE = 1e-3
"""Choices that may differ from the reference's: the best two keys are then nearer to each other than noise rounds."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and arguments to compare on: one example, ``heads`` query heads and ``kv_heads`` of keys."""

    name: str
    q_len: int
    k_len: int
    heads: int = 2
    kv_heads: int = 2
    causal: bool = False
    dropout_p: float = 0.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one comparison said; ``wrong`` is None where the implementation agrees."""

    method: str
    dtype: str
    head_dim: int
    case: str
    wrong: str | None

    def __str__(self) -> str:
        return f"{self.method}, {self.dtype}, d = {self.head_dim}, {self.case}: {self.wrong}"


def cases(length: int, *, timed: bool, dropout: bool) -> list[Case]:
    """What to compare on: the shapes that are timed, and ragged ones, which are not multiples of any tile.

    Args:
        length: of the whole ones.
        timed: for the dtype that is timed; others are compared on ragged sizes only.
        dropout: with dropout too, as models train.
    """
    ragged = Case("ragged", length - 3, length - length // 4 + 1)
    grouped = Case("ragged, causal, grouped heads", length - 3, length - length // 4 + 1, 4, 2, True)
    if not timed:
        return [ragged, grouped]
    whole = [Case("whole", length, length), Case("causal", length, length, causal=True), ragged, grouped]
    return [*whole, Case("dropout", length, length, dropout_p=0.1)] if dropout else whole


def check(
    methods: Sequence[tuple[str, str]],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    head_dims: Sequence[int],
    length: int,
    processes: int = 0,
) -> list[Verdict]:
    """Compares implementations and arms of ours with the reference.

    Args:
        methods: implementation and arm of each.
        device: where they run.
        dtypes: the first is that which will be timed, and is compared on more cases.
        head_dims: dtypes other than the first are compared at the first of these only.
        length: of the sequences.
        processes: compare each method in a process of its own, so many at once: kernels compile side by side, and one
            that dies, hangs or ruins its device does so alone. 0: all in this process.

    Returns:
        A verdict for each comparison made. What an implementation does not support is not among them.
    """
    names = [_name(dtype) for dtype in dtypes]
    if processes == 0:
        found = [check_method(*method, str(device), names, list(head_dims), length) for method in methods]
        return [Verdict(**verdict) for verdicts in found for verdict in verdicts]

    def check_alone(method: tuple[str, str]) -> list[dict[str, Any]]:
        target, arguments = f"{__name__}:check_method", (*method, str(device), names, list(head_dims), length)
        try:
            return fresh.call(target, *arguments, timeout=LONGEST_CHECK)  # type: ignore[no-any-return]
        except fresh.ProcessError as error:
            return [
                dataclasses.asdict(Verdict(" ".join(method), names[0], head_dim, "all", str(error)))
                for head_dim in head_dims
            ]

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        return [Verdict(**verdict) for verdicts in pool.map(check_alone, methods) for verdict in verdicts]


def check_method(
    impl: str, arm: str, device: str, dtypes: list[str], head_dims: list[int], length: int
) -> list[dict[str, Any]]:
    """The verdicts on one implementation and arm, as dicts; arguments as in :func:`check`, by name."""
    verdicts = []
    for dtype in dtypes:
        timed = dtype == dtypes[0]
        for head_dim in head_dims if timed else head_dims[:1]:
            for case in cases(length, timed=timed, dropout=head_dim == head_dims[0]):
                q, k, v = inputs(case, head_dim, torch.device(device), getattr(torch, dtype))
                try:
                    wrong = disagreement(impl, ARMS[arm], q, k, v, case)
                except ValueError as error:
                    if "cannot compute this call" in str(error):
                        continue  # it does not do this, and says so
                    wrong = _described(error)
                except Exception as error:  # whatever a kernel dies of, its compiler included, is a finding
                    wrong = _described(error)
                verdicts.append(dataclasses.asdict(Verdict(f"{impl} {arm}", dtype, head_dim, case.name, wrong)))
    return verdicts


def inputs(case: Case, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a case; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, case.heads, case.q_len, head_dim, generator=generator)
    k, v = (torch.randn(1, case.kv_heads, case.k_len, head_dim, generator=generator) for _ in range(2))
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def disagreement(
    impl: str, settings: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, case: Case | None = None
) -> str | None:
    """What is wrong with an implementation of ours on these inputs; ``None`` if nothing is.

    Output and gradients against the reference in float64 on the same noise. One choice in a thousand may differ; the
    queries concerned are left out of the gradients. The largest error may be twice that of the reference in the
    inputs' dtype, whose inside is float32, and further two roundings of the inputs' dtype of the largest entry: fast
    kernels round the weights and their gradients to that dtype before they multiply by them.
    """
    arguments = dict(settings)
    if case is not None:
        arguments |= {"is_causal": case.causal, "enable_gqa": case.heads != case.kv_heads, "dropout_p": case.dropout_p}
    leaves = [
        [x.detach().to(dtype).requires_grad_() for x in (q, k, v)] for dtype in (torch.float64, q.dtype, q.dtype)
    ]
    outputs = [
        ga.gumbel_attention(*tensors, seed=1, impl=name, **arguments)
        for tensors, name in zip(leaves, ("reference", "reference", impl), strict=True)
    ]
    exact = outputs[0].detach()
    same = torch.ones_like(exact[..., :1], dtype=torch.bool)
    if settings.get("hard"):
        far = 0.1 * exact.abs().max()
        for output in outputs[1:]:
            same &= (output.detach() - exact).abs().amax(-1, keepdim=True) <= far
        flipped = 1.0 - same.double().mean().item()
        if flipped > FLIPPED_SHARE:
            return f"{flipped:.2%} of the choices differ"
    d_out = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(q.device, q.dtype) * same
    results = [
        [output.detach() * same, *torch.autograd.grad(output, tensors, d_out.to(output.dtype))]
        for output, tensors in zip(outputs, leaves, strict=True)
    ]
    slack = max(1e-5, 2 * torch.finfo(q.dtype).eps)
    for name, want, yardstick, got in zip(("output", "dQ", "dK", "dV"), *results, strict=True):
        error, bound = ((x.double() - want).abs().max().item() for x in (got, yardstick))
        if not error <= 2 * bound + slack * want.abs().max().item():
            return f"{name} is off by {error:.2e}, the reference in {q.dtype} by {bound:.2e}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
