"""Which texts are part of another text, however their punctuation is written."""

from __future__ import annotations

import pytest

from tasks.overlap import rows_outside

EVALUATED = ["-LRB- Caf\u00e9 society -RRB- is n't bad\\/good , really .", "a plain end"]


@pytest.mark.parametrize(
    "text",
    [
        "( cafe society ) is n't",
        "Cafe\u0301 society",
        "bad \\/ good",
        "bad/good, really!",
        "really",
        "a  PLAIN end .",
    ],
)
def test_spelling_does_not_hide_that_a_text_is_part_of_another(text: str) -> None:
    assert rows_outside([text], EVALUATED) == []


@pytest.mark.parametrize("text", ["society cafe", "caf", "really a plain", "lrb", "...", "", "good bad"])
def test_other_words_and_words_of_two_texts_are_none(text: str) -> None:
    assert rows_outside([text], EVALUATED) == [0]
