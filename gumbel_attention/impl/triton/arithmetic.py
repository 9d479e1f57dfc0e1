"""Arithmetic that all kernels share, with ways around what the interpreter lacks."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOWEST = tl.constexpr(-3.0e38)
"""Stands for -inf: 0 * LOWEST is 0."""


@triton.jit
def log2(x):
    """log2 to 2^-22 near 1 and about 1 ulp elsewhere, in one instruction."""
    if INTERPRET:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def negative_log2(x):
    """-log2 as ``log2`` gives it. A negation outside would be 0 - x, one instruction more."""
    if INTERPRET:
        return -tl.log2(x)
    return tl.inline_asm_elementwise(
        "{ .reg .f32 t; lg2.approx.ftz.f32 t, $1; neg.f32 $0, t; }", "=f,f", [x], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def exp2(x):
    """2^x to 2 ulp in one instruction; results below 2^-126 become 0."""
    if INTERPRET:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, total):
    """total + a b, accumulated in float32; float32 operands are not rounded."""
    if INTERPRET:  # its bfloat16 products are wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def product(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A b in float32."""
    return dot(a, b, tl.zeros((ROWS, COLUMNS), tl.float32))


@triton.jit
def wide_product(x, factor: tl.constexpr):
    """The high and the low word of the product of unsigned 32-bit numbers: one instruction for both."""
    if INTERPRET:
        y = tl.full((1,), factor, tl.uint32)
        return tl.umulhi(x, y), x * y
    return tl.inline_asm_elementwise(
        "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }", "=r,=r,r,r",
        [x, tl.full((1,), factor, tl.uint32)], (tl.uint32, tl.uint32), is_pure=True, pack=1,
    )  # fmt: skip
