"""Runs that hold memory of known size, measured as the benchmark measures; each for a fresh process."""

import torch

from harness.contenders import contender_named
from harness.memory import WARM_UP_LENGTH, extra_bytes, random_inputs, run_of

CPU = torch.device("cpu")


def hold(sizes: list[int]) -> list[int]:
    """The bytes measured while so many MiB are held."""
    return [extra_bytes(lambda size=size: torch.ones(size, 2**18), CPU) for size in sizes]


def attend(length: int, rows: int) -> int:
    """The bytes of a forward and backward pass of the CPU kernels, while so many rows of scores are held beside it."""
    torch.set_num_threads(1)
    attention = contender_named("cpu gumbel-st", CPU).attention
    inputs = random_inputs(1, length, 64, CPU, torch.float32)
    small = tuple(x[..., :WARM_UP_LENGTH, :] for x in inputs)
    run_of(attention, "forward+backward", small, False)()
    run = run_of(attention, "forward+backward", inputs, False)
    return extra_bytes(lambda: (torch.ones(rows, length), run()), CPU)
