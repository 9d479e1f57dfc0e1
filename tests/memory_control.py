"""Runs that hold memory of known size, measured as the benchmark measures; each for a fresh process."""

import torch

from harness.memory import extra_bytes, warm_run

CPU = torch.device("cpu")


def hold(sizes: list[int]) -> list[int]:
    """The bytes measured while so many MiB are held."""
    return [extra_bytes(lambda size=size: torch.ones(size, 2**18), CPU) for size in sizes]


def attend(length: int, rows: int) -> int:
    """The bytes of a forward and backward pass of the CPU kernels, while so many rows of scores are held beside it."""
    torch.set_num_threads(1)
    run = warm_run("cpu gumbel-st", "forward+backward", 1, length, 64, False, "float32")
    return extra_bytes(lambda: (torch.ones(rows, length), run()), CPU)
