"""How many rows the conformance tests compare the choices of, and how many they leave out."""

from torch import Tensor


class Tally:
    """Rows whose choice was compared, and those left out, by implementation."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, int]] = {}

    def add(self, name: str, clear: Tensor) -> None:
        rows, excluded = self.rows.get(name, (0, 0))
        self.rows[name] = rows + clear.numel(), excluded + int((~clear).sum())

    def line(self, name: str) -> str:
        rows, excluded = self.rows[name]
        share = f"{excluded} of {rows} rows ({excluded / rows:.1e})"
        return f"{name}: {share} left out, their two best keys lie within the error"


SHARE = 1e-3
"""Of the rows, how many may have their two best keys within the error."""
TALLY = Tally()
"""The share of rows that the conformance tests of a file left out of the comparison of choices; see conftest.py."""
