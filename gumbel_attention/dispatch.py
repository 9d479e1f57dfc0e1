"""Which implementation computes a call, and why not the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .impl import blockwise, reference, sdpa
from .impl.problem import AttentionInfo, AttentionProblem

KERNEL_SCORES = 2**14
"""Scores of a call up to which ``"auto"`` does not look for compiled kernels: they would gain nothing."""
BLOCK_SCORES = 2**22
"""Scores of a call up to which the reference is faster than blocks, which compute them twice."""
MASK_SCORES = 2**28
"""Scores of a call on a GPU from which on its mask is too large to be built for scaled_dot_product_attention."""
HALF_PRECISION_HEAD_SCORES = 2**13
"""Scores of a head up to which the others train faster than torch's attention on the CPU, whose backward pass takes
two to eight times as long as in float32; above, the reference, which is left where there is no compiler, is slower."""


Result = TypeVar("Result")


class Implementation(NamedTuple):
    """One way to compute attention's output, and, where it can tell them, the keys chosen and their probability."""

    attention: Callable[[AttentionProblem], Tensor]
    unsupported: Callable[[AttentionProblem], str | None]
    with_choice: Callable[[AttentionProblem], AttentionInfo] | None = None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What would run, as :func:`gumbel_attention.explain` returns it; printable.

    Attributes:
        impl: the implementation.
        rejected: the others that ``impl="auto"`` prefers to it, each with the reason it was passed over.
    """

    impl: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        lines = [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join([f"impl={self.impl!r} runs", *lines])


def _nothing(problem: AttentionProblem) -> None:
    return None


def _triton_unsupported(problem: AttentionProblem) -> str | None:
    from .impl import triton

    return triton.unsupported(problem)


def _triton_attention(problem: AttentionProblem) -> Tensor:
    from .impl import triton

    return triton.attention(problem)


def _cpu_unsupported(problem: AttentionProblem) -> str | None:
    from .impl import cpu

    return cpu.unsupported(problem) or cpu.available()


def _cpu_attention(problem: AttentionProblem) -> Tensor:
    from .impl import cpu

    return cpu.attention(problem)


IMPLEMENTATIONS = {
    "sdpa": Implementation(sdpa.attention, sdpa.unsupported),
    "triton": Implementation(_triton_attention, _triton_unsupported),
    "cpu": Implementation(_cpu_attention, _cpu_unsupported),
    "blockwise": Implementation(blockwise.attention, _nothing, blockwise.attention_with_choice),
    "reference": Implementation(lambda problem: reference.attention(problem).output, _nothing, reference.attention),
}
"""By name, in the order in which ``"auto"`` prefers them. Kernels are imported and compiled when first asked about."""

EXPLICIT_ONLY = {"triton": "its kernels are tested by interpreter, not yet on a GPU: it runs where it is named"}
"""Implementations that ``"auto"`` does not take, and why."""

WORTH_IT = {"cpu": KERNEL_SCORES, "blockwise": BLOCK_SCORES}
"""More scores than this make an implementation worth it to ``"auto"``."""


def choose_implementation(
    problem: AttentionProblem, impl: str, need_weights: bool = False, need_choice: bool = False
) -> Explanation:
    """The implementation for a problem.

    Args:
        problem: the checked arguments.
        impl: a name, which is then the one or an error; or ``"auto"``.
        need_weights: weights are wanted: only the reference holds them.
        need_choice: the keys chosen and their log-probability are wanted.

    Raises:
        ValueError: the implementation named cannot do it; the message says why and what can.
    """
    rejected: dict[str, str] = {}
    for name in IMPLEMENTATIONS if impl == "auto" else [impl]:
        reason = None
        if need_weights and name != "reference":
            reason = "it holds no weights"
        elif need_choice and IMPLEMENTATIONS[name].with_choice is None:
            reason = "it does not tell which keys it chose"
        elif impl == "auto":
            reason = _passed_over(name, problem)
        reason = reason or IMPLEMENTATIONS[name].unsupported(problem)
        if reason is None:
            return Explanation(name, rejected)
        rejected[name] = reason
    alternative = "impl='auto'"
    if need_weights:
        alternative = "impl='reference', or need_weights=False, or gumbel_attention, which returns the output only"
    raise ValueError(f"impl={impl!r} cannot compute this call: {rejected[impl]}. Use {alternative}.")


def compute(problem: AttentionProblem, impl: str) -> Tensor:
    """The output by an implementation that :func:`choose_implementation` gave.

    Raises:
        RuntimeError: as the implementation does; where memory ran out, with a note that says what needs less.
    """
    return _run(IMPLEMENTATIONS[impl].attention, problem, impl)


def compute_with_choice(problem: AttentionProblem, impl: str) -> AttentionInfo:
    """:func:`compute` with the keys chosen and their log-probability, and the weights where it holds them."""
    function = IMPLEMENTATIONS[impl].with_choice
    assert function is not None
    return _run(function, problem, impl)


def _run(function: Callable[[AttentionProblem], Result], problem: AttentionProblem, impl: str) -> Result:
    if torch.compiler.is_compiling():
        return function(problem)
    try:
        return function(problem)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            error.add_note(f"gumbel_attention: memory ran out in impl={impl!r}; {_NEEDS_LESS[impl]}")
        raise


_LINEAR = "its memory is linear in the lengths: take fewer examples or heads at a time."
_NEEDS_LESS = {
    "reference": "it keeps all scores. impl='blockwise' does not, nor do the compiled kernels.",
    "sdpa": "with dropout or a mask torch's own attention may keep all scores. impl='blockwise' does not.",
    "blockwise": _LINEAR,
    "cpu": _LINEAR,
    "triton": _LINEAR,
}


def _passed_over(name: str, problem: AttentionProblem) -> str | None:
    """Why ``"auto"`` does not take an implementation that could do it; ``None`` if it does."""
    if name in EXPLICIT_ONLY:
        return EXPLICIT_ONLY[name]
    if _scores(problem) <= WORTH_IT.get(name, -1):
        many = "so few" if torch.compiler.is_compiling() else _scores(problem)  # a number compiles anew for each shape
        return f"it is not worth it for {many} scores"
    if name != "sdpa":
        return None
    on_cpu = problem.query.device.type == "cpu"
    if on_cpu and problem.dropout_p > 0.0:
        return "on the CPU it keeps all scores where there is dropout"
    if on_cpu and _trained_in_half_precision(problem) and _head_scores(problem) <= HALF_PRECISION_HEAD_SCORES:
        return f"its backward pass is slow for short sequences in {problem.query.dtype}"
    if problem.is_causal and problem.keep is not None and _scores(problem) > (BLOCK_SCORES if on_cpu else MASK_SCORES):
        return "a causal mask together with another one would have to be built"
    return None


def _trained_in_half_precision(problem: AttentionProblem) -> bool:
    tensors = (problem.query, problem.key, problem.value)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return needs_gradient and problem.query.dtype in (torch.bfloat16, torch.float16)


def _scores(problem: AttentionProblem) -> int:
    batch, heads, _, _ = problem.query.shape
    return batch * heads * _head_scores(problem)


def _head_scores(problem: AttentionProblem) -> int:
    return problem.query.shape[-2] * problem.key.shape[-2]
