"""Texts made of two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.splicing import splice

LENGTHS = (9, 7, 5, 2, 1, 9)
PAD = 99


def batch(left: bool = False) -> dict[str, Tensor]:
    """Texts whose tokens are 10 times the row plus the place, each row's own kind in token_type_ids."""
    ids = torch.full((len(LENGTHS), 9), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        here = slice(9 - length, 9) if left else slice(0, length)
        ids[row, here] = 10 * (row + 1) + torch.arange(length)
        mask[row, here] = 1
    kinds = torch.arange(len(LENGTHS))[:, None] * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds, "labels": torch.arange(len(LENGTHS))}


@pytest.mark.parametrize("left", [False, True])
def test_a_new_text_is_the_beginning_of_its_own_and_the_end_of_another(left: bool) -> None:
    torch.manual_seed(0)
    given = batch(left)
    before = {name: value.clone() for name, value in given.items()}
    seen = set()
    for _ in range(300):
        found, new = splice(given, 0.7, PAD)
        assert torch.equal(found["labels"], given["labels"])
        for row in range(len(LENGTHS)):
            if not new[row]:
                assert all(torch.equal(found[name][row], given[name][row]) for name in given)
                continue
            length = int(found["attention_mask"][row].sum())
            tokens = found["input_ids"][row, :length].tolist()
            assert found["attention_mask"][row].tolist() == [1] * length + [0] * (9 - length)
            assert set(found["input_ids"][row, length:].tolist()) <= {PAD}
            origins = [token // 10 - 1 for token in tokens]
            kept = origins.count(row)
            other = origins[-1]
            assert other != row
            assert origins == [row] * kept + [other] * (length - kept)
            assert found["token_type_ids"][row, :length].tolist() == origins
            assert [token % 10 for token in tokens[:kept]] == list(range(kept))
            end = LENGTHS[other]
            assert [token % 10 for token in tokens[kept:]] == list(range(end - (length - kept), end))
            seen.add((row, other, kept, length - kept))
    assert all(torch.equal(given[name], before[name]) for name in given)
    rows = {(row, other) for row, other, *_ in seen}
    assert rows == {(a, b) for a in range(6) for b in range(6) if a != b and 4 not in (a, b)}, "4 has one token"
    assert {kept for row, other, kept, _ in seen if (row, other) == (1, 2)} == set(range(1, 7)), "every cut"
    assert {rest for row, other, _, rest in seen if (row, other) == (1, 2)} == set(range(1, 5))


def test_the_share_is_that_of_the_texts() -> None:
    """2,000 texts, each new with probability 0.3: within 4 standard errors, a false alarm in 16,000."""
    torch.manual_seed(1)
    ids = torch.arange(6000).view(2000, 3)
    share = splice({"input_ids": ids}, 0.3, 0)[1].float().mean().item()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert not splice({"input_ids": ids}, 0.0, 0)[1].any(), "the control"


def test_without_a_mask_every_token_counts_and_shorter_texts_get_one() -> None:
    torch.manual_seed(0)
    ids = torch.arange(1, 21).view(2, 10)
    found, new = splice({"input_ids": ids}, 1.0, 0)
    while not new.all() or found["attention_mask"].all():
        found, new = splice({"input_ids": ids}, 1.0, 0)
    assert torch.equal(found["attention_mask"] == 0, found["input_ids"] == 0)
    one, new = splice({"input_ids": ids[:1]}, 1.0, 0)
    assert not new.any()
    assert torch.equal(one["input_ids"], ids[:1])
