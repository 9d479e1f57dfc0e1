"""Measures of the attention, tokens and speed in training: of which batches they are, and what counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from interrupted import start, stop_at_batch
from recorder import RATES, Recorder, recorded, series_of, without_rates

import finetune
import gumbel_attention as ga
from gumbel_attention.diagnostics import MEASURES, collect_diagnostics
from harness.arguments import FinetuneArguments
from harness.attention_measures import AttentionMeasures
from harness.throughput import count_tokens

LAYERS = [f"bert.encoder.layer.{number}.attention.self" for number in (0, 1)]


@pytest.fixture
def trackers() -> Iterator[list[Recorder]]:
    with recorded() as runs:
        yield runs


@pytest.mark.parametrize("measures", ["mean", "layers"])
def test_the_measures_are_those_of_the_last_batch_before_an_entry(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, measures: str
) -> None:
    """Two batches a step, an entry every second step: of twelve batches the fourth, the eighth and the twelfth."""
    batches, found = [0], []
    compute_loss = finetune.Classification.compute_loss

    def compute(task: Any, model: Any, batch: Any) -> torch.Tensor:
        batches[0] += 1
        return compute_loss(task, model, batch)

    @contextmanager
    def collect(model: Any) -> Iterator[Any]:
        before = batches[0]
        with collect_diagnostics(model) as collected:
            yield collected
        assert batches[0] == before + 1
        found.append((batches[0], collected))

    monkeypatch.setattr(finetune.Classification, "compute_loss", compute)
    monkeypatch.setattr("harness.attention_measures.collect_diagnostics", collect)
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 2}
    record = start(settings, **sizes, attention_metrics=measures, tau=0.3)
    assert [number for number, _ in found] == [4, 8, 12]
    for entry, (_, collected) in zip(record.train, found, strict=True):
        assert list(entry["attention"]) == list(MEASURES)
        assert entry["attention"] == pytest.approx({k: v.item() for k, v in collected.summary().items()}, rel=1e-5)
        assert 0 < entry["attention"]["entropy"] < 3
        assert 0 < entry["attention"]["argmax_flip_rate"] < 1
        assert ("attention_layers" in entry) == (measures == "layers")
        for layer, values in entry.get("attention_layers", {}).items():
            expected = {k: v.item() for k, v in collected.per_layer()[layer].items()}
            assert values == pytest.approx(expected, rel=1e-5), layer
        if measures == "layers":
            assert list(entry["attention_layers"]) == LAYERS


def test_a_measure_of_no_query_is_null(settings: dict[str, Any], trackers: list[Recorder], tmp_path: Path) -> None:
    """Gumbel-Rao sends other gradients than those that zero_gradient_share is about."""
    start(settings, report_to="wandb", attention_metrics="layers", hard=True, estimator="gumbel_rao", samples=2)
    entry = json.loads((tmp_path / "run" / "results.json").read_text())["series"]["train"][0]
    assert entry["attention"]["zero_gradient_share"] is None
    assert entry["attention"]["entropy"] > 0
    assert without_rates(trackers[0].told) == series_of(tmp_path / "run")


def test_measures_weigh_processes_by_what_they_counted() -> None:
    """The sums and counts of two processes are added before they are divided."""
    other = torch.tensor([[[9.0, 3.0]] * len(MEASURES)])
    measures = AttentionMeasures(Accelerator(cpu=True), torch.nn.Linear(1, 1), "layers")
    measures._layers, measures._totals = ["one"], torch.tensor([[[1.0, 1.0]] * len(MEASURES)])
    with mock.patch.object(measures._accelerator, "reduce", lambda mine, reduction: mine + other):
        entry = measures.read()
    assert entry == {"attention": dict.fromkeys(MEASURES, 2.5), "attention_layers": {"one": entry["attention"]}}
    assert measures.read() == {}, "each batch once"


def test_a_process_that_has_no_example_of_its_own_does_not_count() -> None:
    model, x = ga.GumbelMultiheadAttention(4, 2, config=ga.GumbelAttentionConfig(tau=0.5)), torch.randn(3, 1, 4)
    measures = AttentionMeasures(Accelerator(cpu=True), model, "mean")
    entropy = []
    for share in (1.0, 0.0):
        with measures.measuring(True, share):
            model(x, x, x)
        entropy.append(measures.read()["attention"]["entropy"])
    assert entropy[0] > 0
    assert entropy[1] is None


def test_tokens_are_counted_without_padding(settings: dict[str, Any], tmp_path: Path) -> None:
    args = FinetuneArguments(**settings)
    rows = Path(str(args.train_file)).read_text().splitlines()[1:]
    tokens = sum(len(row.split("\t")[0].split()) + 2 for row in rows)  # [CLS] and [SEP] are tokens
    sizes = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "logging_steps": 4}
    record = start(settings, **sizes)
    assert record.tokens == 2 * tokens
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["tokens"] == 2 * tokens
    assert results["tokens_per_second"] == pytest.approx(2 * tokens / results["train_seconds"])


def test_tokens_of_a_batch() -> None:
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 1, 1]])
    labels = torch.tensor([[5, -100, -100], [5, 5, 5]])
    counted = [
        count_tokens(batch)
        for batch in (
            {"input_ids": ids, "attention_mask": mask, "labels": labels},
            {"input_ids": ids, "attention_mask": mask.bool(), "labels": torch.zeros(2)},
            {"input_ids": ids, "labels": labels},
            {"input_ids": ids, "labels": torch.zeros(2)},
            {"input_ids": ids},
        )
    ]
    assert [each.item() for each in counted if each is not None] == [5, 5, 4, 6, 6]
    assert {each.dtype for each in counted if each is not None} == {torch.int64}
    assert count_tokens({"facts": ids}) is None


def test_the_speed_is_that_of_the_steps_since_the_last_entry_also_after_a_stop(
    settings: dict[str, Any], trackers: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves on by a second at every batch and by 1000 between the runs; batches of 8 examples."""
    clock, compute_loss = [0.0], finetune.Classification.compute_loss

    def compute(task: Any, model: Any, batch: Any) -> torch.Tensor:
        clock[0] += 1
        return compute_loss(task, model, batch)

    monkeypatch.setattr("harness.loop.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(finetune.Classification, "compute_loss", compute)
    stop_at_batch(3, settings, monkeypatch, report_to="wandb", logging_steps=2)
    clock[0] += 1000
    record = start(settings, report_to="wandb", logging_steps=2, resume_from_checkpoint="latest")
    rates = [values[RATES[0]] for run in trackers for _, values in run.told if RATES[0] in values]
    assert rates == [8.0, 8.0, 8.0]
    assert record.train_seconds == 6.0
    assert record.tokens == start(settings, output_dir=settings["output_dir"] + "-whole").tokens
