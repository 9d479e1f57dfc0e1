"""Runs of known size, measured as the benchmark measures; for a fresh process."""

import torch

from harness.memory import extra_bytes


def hold(sizes: list[int]) -> list[int]:
    """The bytes measured while so many MiB are held."""
    return [extra_bytes(lambda size=size: torch.ones(size, 2**18), torch.device("cpu")) for size in sizes]
