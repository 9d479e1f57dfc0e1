"""Which examples of an evaluation were right, as a short text, so that two evaluations can be compared one by one."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def to_text(right: Tensor) -> str:
    """``COUNT:HEX`` of the truth values (N,), the first in the highest bit."""
    packed = np.packbits(right.cpu().numpy().astype(bool))
    return f"{len(right)}:{packed.tobytes().hex()}"


def from_text(text: str) -> np.ndarray:
    """The truth values (N,) of :func:`to_text`.

    Raises:
        ValueError: the text is not one of its.
    """
    count, _, digits = text.partition(":")
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8))
    if not count.isdecimal() or not 0 <= len(bits) - int(count) < 8:
        raise ValueError(f"expected COUNT:HEX with 8 values in a byte, got {text[:40]!r}.")
    return bits[: int(count)].astype(bool)
