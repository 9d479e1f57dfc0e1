"""Training texts that an evaluation text contains: phrases of the sentences that a model is judged on."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_BRACKET = re.compile(r"-[lr][rcs]b-")
"""The Penn treebank's names of brackets."""
_WORD = re.compile(r"\w+")


def rows_outside(texts: Iterable[str], evaluated: Iterable[str]) -> list[int]:
    """The rows of texts that are, as whole words, no part of an evaluated text.

    Case, accents and punctuation, in whose spelling editions of one text differ, do not count. A text without a word
    is no part of any.
    """
    whole = "\n".join(map(_words, evaluated))
    return [row for row, text in enumerate(texts) if (words := _words(text)).isspace() or words not in whole]


def _words(text: str) -> str:
    """The words of a text between single spaces, one at either end."""
    plain = unicodedata.normalize("NFKD", _BRACKET.sub(" ", text.casefold()))
    return f" {' '.join(_WORD.findall(''.join(c for c in plain if not unicodedata.combining(c))))} "
