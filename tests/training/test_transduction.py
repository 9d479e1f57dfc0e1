"""String transduction: reading, symbols, edit distance, and the script end to end in small."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM

import gumbel_attention as ga
import transduction
from harness.errors import UsageError
from harness.parsing import parse_arguments
from harness.stopping import Stopped
from tasks import transduction as task
from tasks.transduction import (
    BEGIN,
    END,
    IGNORED,
    UNKNOWN,
    Inflection,
    Symbols,
    TransductionArguments,
    edit_distance,
    read_inflections,
)

ROOT = Path(__file__).parents[2]
LEMMAS = ["ab", "abba", "bad", "cab", "dab", "ß ä", "bc", "acdc"]
EXAMPLES = [Inflection(lemma, lemma + end, ("V", tag)) for lemma in LEMMAS for end, tag in (("s", "3"), ("ed", "PST"))]


def write(path: Path, examples: list[Inflection]) -> str:
    path.write_text("".join(f"{each.lemma}\t{each.form}\t{';'.join(each.tags)}\n" for each in examples), "utf-8")
    return str(path)


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """A run of six optimiser steps."""
    return {
        "train_file": write(tmp_path / "train", EXAMPLES),
        "validation_file": write(tmp_path / "dev", [*EXAMPLES[1:6], Inflection("zebra", "zebras", ("V", "3"))]),
        "max_source_length": 9,
        "max_target_length": 8,
        "width": 16,
        "num_heads": 2,
        "dropout": 0.2,
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 4,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "eval_steps": 4,
        "logging_steps": 4,
        "hard": True,
        "tau_schedule": "exponential",
        "tau_end": 0.5,
        "output_dir": str(tmp_path / "run"),
    }


def start(settings: dict[str, Any], **changes: Any) -> Any:
    return transduction.run(TransductionArguments(**{**settings, **changes}))


def data_of(settings: dict[str, Any]) -> task.TransductionData:
    return task.load_data(TransductionArguments(**settings), lambda line: None)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("abc", "abc", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),
        ("gumbo", "gambol", 2),
        ("ß", "ss", 2),
    ],
)
def test_edit_distance_of_known_pairs(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def by_definition(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    substituted = by_definition(a[1:], b[1:]) + (a[0] != b[0])
    return min(by_definition(a[1:], b) + 1, by_definition(a, b[1:]) + 1, substituted)


@given(st.text("ab", max_size=4), st.text("ab", max_size=4))
@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
def test_edit_distance_is_the_least_of_all_ways(a: str, b: str) -> None:
    assert edit_distance(a, b) == by_definition(a, b)


def test_symbols_round_trip(tmp_path: Path) -> None:
    symbols = Symbols.of(EXAMPLES)
    for text in ("", "ß ä", "abbaed", "dcba"):
        assert symbols.decode([*symbols.encode(text), END, 7, 8]) == text
    symbols.save(tmp_path)
    again = Symbols.load(tmp_path)
    assert (again.characters, again.tags) == (symbols.characters, symbols.tags)
    assert len(symbols) == 4 + len(set("abcdeßä s")) + len({"V", "3", "PST"})


def test_tags_and_characters_are_told_apart_and_unknown_ones_never_match() -> None:
    symbols = Symbols(["3", "a"], ["3", "V"])
    source = symbols.encode_source(Inflection("3a?", "", ("V", "3", "new")))
    assert source == [4, 5, UNKNOWN, END, 7, 6, UNKNOWN]
    decoded = symbols.decode([5, UNKNOWN, 6, BEGIN, len(symbols)])
    assert decoded == "a" + "\N{REPLACEMENT CHARACTER}" * 4


def test_labels_end_and_pad(tiny: dict[str, Any]) -> None:
    data = data_of(tiny)
    collate = task.Collator(data.symbols, TransductionArguments(**tiny))
    batch = collate([(3, data.train[0]), (5, data.train[3])])
    assert batch["index"].tolist() == [3, 5]
    assert batch["labels"].tolist() == [
        [*data.symbols.encode("abs"), END, IGNORED, IGNORED, IGNORED],
        [*data.symbols.encode("abbaed"), END],
    ]
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 0)
    assert batch["attention_mask"].sum(1).tolist() == [5, 7]


def test_what_is_too_long_or_unknown_is_cut_counted_and_told(tiny: dict[str, Any], tmp_path: Path) -> None:
    lines: list[str] = []
    tiny |= {"train_file": write(tmp_path / "long", [*EXAMPLES, Inflection("abcdabcda", "abcdabcdas", ("V", "3"))])}
    args = TransductionArguments(**tiny)
    data = task.load_data(args, lines.append)
    assert lines == [
        "train_file: 1 of 17 inputs are cut to max_source_length=9",
        "train_file: 1 of 17 forms are cut to max_target_length=8",
        "validation_file: 1 of 6 examples have symbols that train_file lacks",
    ]
    batch = task.Collator(data.symbols, args)([(0, data.train[-1])])
    assert batch["labels"].tolist() == [data.symbols.encode("abcdabcd")]
    assert batch["input_ids"].shape == (1, 9)


@pytest.mark.parametrize("arm", [{}, {"attention": "unpatched"}], ids=["gumbel-st", "softmax"])
def test_a_run_ends_with_the_metrics_of_its_saved_model(
    tiny: dict[str, Any], tmp_path: Path, arm: dict[str, Any]
) -> None:
    record = start(tiny, save_model=True, **arm)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["final"] == record.final
    assert results["num_tags"] == 3
    folder = tmp_path / "run" / "model"
    unpatched = arm.get("attention") == "unpatched"
    assert set(record.final) == ({"noise_off"} if unpatched else {"noise_off", "noise_on"})
    if unpatched:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    else:
        model = ga.from_pretrained(AutoModelForSeq2SeqLM, folder)
    model.eval()
    symbols, data = Symbols.load(folder), data_of(tiny)
    if not unpatched:
        names = [layer.name for layer in ga.patch_of(model).layers]
        assert names == ["model.decoder.layers.0.encoder_attn"]
    losses, distances = [], []
    for example in data.validation:  # one by one, without padding and cache
        source = torch.tensor([symbols.encode_source(example)])
        target = [*symbols.encode(example.form), END]
        log_probs = model(input_ids=source, labels=torch.tensor([target])).logits[0].log_softmax(-1)
        losses += [-log_probs[position, number].item() for position, number in enumerate(target)]
        output = [BEGIN]
        while len(output) <= 8 and output[-1] != END:
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([output]), use_cache=False).logits
            output.append(int(logits[0, -1].argmax()))
        distances.append(edit_distance(symbols.decode(output[1:]), example.form))
    final = record.final["noise_off"]
    assert final["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert final["edit_distance"] == pytest.approx(sum(distances) / 6)
    assert final["exact_match"] == sum(distance == 0 for distance in distances) / 6


def test_exact_match_of_a_model_that_is_right(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three right forms, one that ends early, one with an unknown character, and one too long."""
    data = data_of(tiny)
    args = TransductionArguments(**tiny)
    _, loader = task.make_loaders(data, args, torch.Generator())
    model = task.make_model(data.symbols, args)
    outputs = {example.lemma + example.form: example.form for example in data.validation}
    wrong = data.validation[0]
    outputs[wrong.lemma + wrong.form] = wrong.form[:-2]
    batches = iter(list(loader))

    def generate(input_ids: torch.Tensor, **kw: Any) -> torch.Tensor:
        rows = next(batches)["index"].tolist()
        texts = [outputs[data.validation[row].lemma + data.validation[row].form] for row in rows]
        return task._pad([[BEGIN, *data.symbols.encode(text), END] for text in texts], 0)

    monkeypatch.setattr(model, "generate", generate)
    metrics = task.evaluate(Accelerator(), model, loader, data)
    assert metrics["exact_match"] == pytest.approx(4 / 6)
    assert metrics["edit_distance"] == pytest.approx((2 + 2) / 6)  # "zebras": z and r are unknown
    assert model.training


def test_the_cross_attention_picks_one_symbol_for_each_head(tiny: dict[str, Any]) -> None:
    data, args = data_of(tiny), TransductionArguments(**tiny)
    model = task.make_model(data.symbols, args)
    model.set_attn_implementation("eager")  # the others return no weights
    ga.patch_model(model, ga.GumbelAttentionConfig(hard=True, layers=args.layers))
    batch = task.Collator(data.symbols, args)(list(enumerate(data.train)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    outputs = model.train()(**inputs, output_attentions=True)
    cross = outputs.cross_attentions[0]
    assert torch.equal(cross.sum(-1), torch.ones_like(cross[..., 0]))
    assert set(cross.unique().tolist()) == {0.0, 1.0}
    assert not cross.masked_select(batch["attention_mask"][:, None, None] == 0).any()
    soft = outputs.decoder_attentions[0]
    assert (soft > 0).sum() > soft[..., 0].numel()


def outcome(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    weights = (folder / "model" / "model.safetensors").read_bytes()
    return {key: results[key] for key in ("final", "series", "steps")} | {"weights": weights}


def test_a_stopped_run_goes_on_to_the_same_bits(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny["save_model"] = True
    start(tiny, output_dir=str(tmp_path / "whole"))
    calls, compute_loss = [0], transduction.Transduction.compute_loss

    def interrupted(self: Any, model: Any, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            signal.raise_signal(signal.SIGTERM)
        return compute_loss(self, model, batch)

    with monkeypatch.context() as patched:
        patched.setattr(transduction.Transduction, "compute_loss", interrupted)
        with pytest.raises(Stopped):
            start(tiny)
    record = start(tiny, resume_from_checkpoint="latest")
    assert record.resumed_at == [4]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: expected lines lemma<TAB>form<TAB>tags"),
        ("a\tb\tV\n\n", "line 2: expected lemma<TAB>form<TAB>tags, none of them empty, got ''"),
        ("a\tb\tV\na\tb\n", "line 2: expected lemma<TAB>form<TAB>tags"),
        ("a\t \tV\n", "line 1: expected lemma<TAB>form<TAB>tags, none of them empty"),
        ("a\tb\tV;;3\n", "line 1: expected tags separated by single ';', got 'V;;3'"),
    ],
)
def test_malformed_files_are_refused_with_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "words"
    path.write_text(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        read_inflections(path, "train_file")


def test_unusable_files_and_settings_are_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("müde\tmüder\tADJ\n".encode("latin-1"))
    cases = [
        ({"train_file": str(tmp_path / "none")}, "no such file"),
        ({"validation_file": str(tmp_path / "latin")}, "cannot be read as UTF-8 text"),
        ({"train_file": ""}, "give both train_file and validation_file"),
        ({"model_name_or_path": "minilm"}, "must be 'scratch'"),
        ({"num_heads": 3}, "num_heads=3 must divide width=16"),
        ({"layers": ("crss",)}, "the model cannot be patched"),
    ]
    for changes, message in cases:
        with pytest.raises(UsageError, match=re.escape(message)):
            start(tiny, **changes)


def test_windows_lines_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "words").write_bytes("\ufeffmüde\tmüder\tADJ;CMPR\r\n".encode())
    assert read_inflections(tmp_path / "words") == [Inflection("müde", "müder", ("ADJ", "CMPR"))]


def test_the_configuration_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGMORPHON_DIR", "data")
    monkeypatch.setenv("SIGMORPHON_LANGUAGE", "german")
    path = ROOT / "configs" / "finetune" / "sigmorphon_medium.yaml"
    args = parse_arguments(TransductionArguments, ["--config", str(path)])
    assert args.train_file == "data/german-train-medium"
    assert args.layers == ("cross",)
