"""Training texts that an evaluation text contains: phrases of the sentences that a model is judged on."""

from __future__ import annotations

from collections.abc import Iterable


def rows_outside(texts: Iterable[str], evaluated: Iterable[str]) -> list[int]:
    """The rows of texts that are, as whole words, no part of an evaluated text; case and spaces do not count."""
    whole = "\n".join(map(_words, evaluated))
    return [row for row, text in enumerate(texts) if _words(text) not in whole]


def _words(text: str) -> str:
    """The words of a text between single spaces, one at either end."""
    return f" {' '.join(text.casefold().split())} "
