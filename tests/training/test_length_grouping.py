"""Batches of texts of like length: every example once, less padding, an order that the generator alone draws."""

from __future__ import annotations

from typing import Any

import torch
from tiny import data_of

from harness.arguments import FinetuneArguments
from harness.models import load_tokenizer
from tasks.classification import make_loaders
from tasks.length_grouping import LengthGroupedSampler

LENGTHS = [1 + (37 * index) % 101 for index in range(1003)]


def order(seed: int, lengths: list[int] = LENGTHS, batch_size: int = 8) -> list[int]:
    return list(LengthGroupedSampler(lengths, batch_size, torch.Generator().manual_seed(seed)))


def padding(indices: list[int], batch_size: int = 8) -> int:
    batches = [[LENGTHS[index] for index in indices[i : i + batch_size]] for i in range(0, len(indices), batch_size)]
    return sum(len(batch) * max(batch) - sum(batch) for batch in batches)


def test_every_example_comes_once_and_the_rest_last() -> None:
    indices = order(0)
    assert sorted(indices) == list(range(len(LENGTHS)))
    assert len(LengthGroupedSampler(LENGTHS, 8, torch.Generator())) == len(indices)
    assert sorted(order(0, LENGTHS[:5])) == list(range(5)), "fewer than a batch"


def test_batches_hold_like_lengths_in_random_order() -> None:
    indices = order(0)
    shuffled = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0)).tolist()
    assert padding(indices) < 0.1 * padding(shuffled)


def test_the_batches_of_a_pool_come_in_random_order() -> None:
    means = torch.tensor([LENGTHS[index] for index in order(0, LENGTHS[:400])]).float().view(50, 8).mean(1)
    # Of 50 batches in random order Pearson's r is beyond 0.5 about twice in 10,000 trials; of a sorted pool it is 1.
    assert abs(torch.corrcoef(torch.stack([torch.arange(50.0), means]))[0, 1]) < 0.5


def test_the_seed_alone_decides_the_order() -> None:
    assert order(0) == order(0)
    assert order(0) != order(1)
    generator = torch.Generator().manual_seed(0)
    sampler = LengthGroupedSampler(LENGTHS, 8, generator)
    assert list(sampler) != list(sampler), "another epoch has another order"


def test_the_loader_groups_only_if_told(settings: dict[str, Any]) -> None:
    def mixed_batches(strategy: str) -> int:
        args = FinetuneArguments(**{**settings, "train_sampling_strategy": strategy, "per_device_train_batch_size": 4})
        tokenizer = load_tokenizer(args.model_name_or_path)
        train, _ = make_loaders(data_of(settings), args, tokenizer, torch.Generator().manual_seed(0))
        batches = [batch["attention_mask"].sum(1) for batch in train]
        assert sum(map(len, batches)) == len(data_of(settings).train)
        return sum(int(lengths.min() != lengths.max()) for lengths in batches)

    assert mixed_batches("group_by_length") <= 2, "of the two lengths there are, and a rest"
    assert mixed_batches("random") > 2
