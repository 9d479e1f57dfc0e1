"""The Triton kernels compiled for a Hopper GPU, on any machine: instructions for each score, registers, spills.

triton ships ptxas and nvdisasm. A score's cost is what the loop over tiles holds: its instructions, times threads,
over the scores of a tile. The unmasked loop is what counts in long sequences. Bounds are the counts of triton 3.6
and 3.8 plus a margin of about 5 %.
"""

import collections
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gumbel_attention.arguments import attention_problem

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip
SOFT, HARD = {"hard": False}, {"hard": True}
PLAIN = {"noise": "none"}

# kernel, arguments, instructions for a score in the unmasked loop, bytes of stack
BOUNDS = [
    ("forward", SOFT | PLAIN, 10.4, 0),
    ("forward", SOFT, 25.5, 0),
    ("forward", SOFT | {"is_causal": True}, 25.8, 0),
    ("forward", HARD | PLAIN, 5.8, 0),
    ("forward", HARD, 21.0, 0),
    ("rows", SOFT | PLAIN, 9.0, 0),
    ("rows", SOFT, 24.2, 0),
    ("rows", HARD | PLAIN, 17.2, 0),
    ("rows", HARD, 32.5, 0),
    ("columns", SOFT | PLAIN, 10.8, 0),
    ("columns", SOFT, 26.0, 0),
    ("columns", HARD, 25.4, 0),
    ("forward", SOFT | {"d": 128}, 28.0, 0),
    ("forward", HARD | {"d": 128}, 22.2, 0),
    ("rows", SOFT | {"d": 128}, 26.1, 0),
    ("columns", HARD | {"d": 128}, 31.2, 0),
    ("columns", HARD | {"is_causal": True}, 26.0, 0),
    ("rows", HARD | {"d": 256, "is_causal": True}, 141.0, 160),
    ("forward", SOFT | {"d": 128, "dtype": torch.float32}, 442.0, 0),
    ("rows", HARD | {"d": 128, "dtype": torch.float32}, 805.0, 0),
    ("columns", SOFT | {"d": 128, "dtype": torch.float32}, 686.0, 0),
]

SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory that a program may have, by compute capability."""


def kernel_arguments(name: str, arguments: dict[str, Any], capability: int = 90) -> tuple[Any, dict[str, Any], Any]:
    """A kernel of attention with 8 heads, the arguments it would be called with, and its tile."""
    from gumbel_attention.impl.triton import launch

    arguments = dict(arguments)
    x = torch.empty(2, 8, 4096, arguments.pop("d", 64), dtype=arguments.pop("dtype", torch.bfloat16))
    problem = attention_problem(x, x, x, seed=1, tau=torch.ones(8), **arguments)
    hard, row = problem.choice.hard, torch.empty(2, 8, 4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_shared_memory", lambda device: SHARED_MEMORY[capability])
        tile = launch.kernel_tile(getattr(launch, f"{name}_tile"), problem)
    kept = {"lse_ptr": None if hard and name == "forward" else row, "index_ptr": row.int() if hard else None}
    gradients = {"d_q_ptr": x, "d_k_ptr": x, "d_v_ptr": x, "d_tau_ptr": None, "d_noise_ptr": None}
    return getattr(launch, f"{name}_kernel"), (
        launch.common_arguments(problem) | kept | gradients
        | {"output_ptr": x, "d_output_ptr": x, "delta_ptr": row, "D_TAU": False, "D_NOISE": False}
        | {"do_batch": x.stride(0), "do_head": x.stride(1), "do_row": x.stride(2)}
        | {"BLOCK_Q": tile.q, "BLOCK_K": tile.k}
    ), tile  # fmt: skip


def compiled(kernel: Any, arguments: dict[str, Any], tile: Any, capability: int = 90) -> Any:
    """The kernel specialised to these arguments as a launch would do it: to multiples of 16, and to 1."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, x = parameter.name, arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or x is None or (special and type(x) is int and x == 1):
            signature[name], constants[name] = "constexpr", x
            continue
        signature[name] = TYPES[x.dtype] if isinstance(x, Tensor) else "fp32" if isinstance(x, float) else "i32"
        if isinstance(x, Tensor) or (special and isinstance(x, int) and x % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    source = ASTSource(kernel, signature, constants, attributes)
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)


def disassembled(binary: Any) -> tuple[list[str], list[list[str]]]:
    """The instructions of a compiled kernel, and those of its loops that multiply matrices."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in binary.asm["sass"].splitlines():
        if label := re.match(r"\.?(L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\S+\t(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*);", line):
            if instruction[1].startswith("BRA") and (to := re.search(r"(LBB\w+)", instruction[2])):
                jumps.append((len(instructions), to[1]))
            instructions.append(instruction[1])
    loops = [(labels[to], at) for at, to in jumps if labels.get(to, at + 1) <= at]
    inner = [x for x in loops if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    bodies = [[op for op in instructions[a : b + 1] if op != "NOP"] for a, b in inner]
    return instructions, [body for body in bodies if any("MMA" in op for op in body)]


def resources(binary: Any, folder: Path) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])


def measured(name: str, arguments: dict[str, Any], folder: Path) -> tuple[float, int, int, list[str]]:
    """Instructions for a score in the unmasked loop, registers, bytes of stack, and the loop itself."""
    kernel, values, tile = kernel_arguments(name, arguments)
    binary = compiled(kernel, values, tile)
    instructions, loops = disassembled(binary)
    assert loops, "no loop over tiles found"
    loop = min(loops, key=len)
    cost = len(loop) * 32 * tile.warps / (tile.q * tile.k)
    registers, stack = resources(binary, folder)
    spills = sum(op.startswith(("LDL", "STL")) for op in instructions)
    assert (spills == 0) == (stack == 0)
    print(f"\n{name:8s} {arguments!s:40s} {cost:5.1f} a score, {registers} registers, {stack} B of stack", end="")
    return cost, registers, stack, loop


@pytest.mark.parametrize(("name", "arguments", "bound", "stack_bound"), BOUNDS)
def test_instructions_for_a_score(
    name: str, arguments: dict[str, Any], bound: float, stack_bound: int, tmp_path: Path
) -> None:
    cost, _, stack, loop = measured(name, arguments, tmp_path)
    assert cost <= bound, collections.Counter(loop).most_common()
    assert stack <= stack_bound


@pytest.mark.parametrize("name", ["forward", "rows", "columns"])
def test_noise_stays_in_registers(name: str, tmp_path: Path) -> None:
    """The four words of a Philox call lie in one thread: noise adds nothing that goes through shared memory."""
    (*_, plain), (*_, noisy) = (measured(name, SOFT | more, tmp_path) for more in (PLAIN, {}))

    def moves(loop: list[str]) -> int:
        return sum(op.startswith(("LDS", "STS", "SHFL", "LDSM", "STSM", "BAR")) for op in loop)

    assert moves(noisy) == moves(plain)


def test_kernels_compile_for_ampere() -> None:
    for name in ("forward", "rows", "columns"):
        kernel, values, tile = kernel_arguments(name, HARD, capability=80)
        assert "HMMA" in compiled(kernel, values, tile, capability=80).asm["sass"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "d", "masked"),
    [
        *((80, torch.bfloat16, d, False) for d in (64, 128, 256)),
        *((86, torch.bfloat16, d, masked) for d in (64, 128, 256) for masked in (False, True)),
        (86, torch.float32, 256, True),
        (90, torch.bfloat16, 256, False),
        (90, torch.bfloat16, 256, True),
    ],
)
def test_kernels_fit_into_shared_memory(capability: int, dtype: torch.dtype, d: int, masked: bool) -> None:
    """Triton refuses a kernel that needs more than the GPU has. A hard choice needs no more than a relaxed one."""
    arguments: dict[str, Any] = SOFT | {"d": d, "dtype": dtype}
    if masked:
        arguments |= {"attn_mask": torch.zeros(4096, 4096), "dropout_p": 0.1}
    for name in ("forward", "rows", "columns"):
        kernel, values, tile = kernel_arguments(name, arguments, capability)
        binary = compiled(kernel, values, tile, capability)
        assert binary.metadata.shared <= SHARED_MEMORY[capability], name


@pytest.mark.parametrize("shared", sorted(set(SHARED_MEMORY.values())))
def test_tiles_of_queries_divide_each_other(shared: int) -> None:
    """The column kernel reads by its tiles what the other two wrote by theirs."""
    from gumbel_attention.impl.triton import sizes

    for d in (16, 64, 65, 128, 129, 256):
        for dtype in TYPES:
            for hard in (False, True):
                forward, rows, columns = (
                    getattr(sizes, f"{name}_tile")(d, dtype, hard, shared) for name in ("forward", "rows", "columns")
                )
                assert forward.q % columns.q == rows.q % columns.q == 0
                assert all(sizes.PLACES % tile.q == 0 for tile in (forward, rows, columns))
                assert all(size % sizes.POSITION_BLOCK == 0 for tile in (forward, rows, columns) for size in tile[:2])


@pytest.mark.parametrize("name", ["forward", "rows", "columns"])
def test_offsets_of_heads_have_64_bits(name: str) -> None:
    """Strides of examples and heads are arguments of 32 bits; their products with indices need more."""
    kernel, values, tile = kernel_arguments(name, {"hard": False, "attn_mask": torch.zeros(2, 8, 4096, 4096)})
    ir = compiled(kernel, values, tile).asm["ttir"]
    strides = ("q", "k", "v", "keep", "bias", "seen") + (() if name == "forward" else ("do",))
    for stride in (f"{prefix}_{part}" for prefix in strides for part in ("batch", "head")):
        uses = [line for line in ir.splitlines() if re.search(rf"%{stride}\b(?!:)", line) and "tt.func" not in line]
        assert uses, stride
        assert all("arith.extsi" in line and "to i64" in line for line in uses), (stride, uses)
