"""language_model.py: exact metrics, runs that go on, data, what is refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import outcome
from language_runs import GPT2, TEXT, language_settings, results, start, stop_at_batch, stream_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import gumbel_attention as ga
import language_model
from harness.errors import UsageError
from tasks import language_modelling
from tasks.language_arguments import LanguageModelArguments
from tasks.packing import PackedBlocks
from tasks.text_corpus import character_tokenizer, load_documents


@pytest.fixture
def language(tmp_path: Path) -> dict[str, Any]:
    return language_settings(tmp_path)


def by_hand(folder: Path, documents: list[str], block_size: int) -> tuple[float, int]:
    """Total nats of the documents under a saved model, one token after the other, and the number of tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    sequence = [token for text in documents for token in [tokenizer.eos_token_id, *tokenizer.encode(text)]]
    nats = 0.0
    for place in range(1, len(sequence)):
        first = (place - 1) // block_size * block_size
        with torch.no_grad():
            logits = model(torch.tensor([sequence[first:place]])).logits[0, -1]
        nats -= logits.double().log_softmax(-1)[sequence[place]].item()
    return nats, len(sequence) - 1


@pytest.mark.parametrize("sample_by", ["document", "line"])
def test_bits_per_character_are_those_of_a_hand_computation(
    language: dict[str, Any], tmp_path: Path, sample_by: str
) -> None:
    language |= {"attention": "unpatched", "sample_by": sample_by, "max_train_steps": 2}
    final = start(language).final["noise_off"]
    text = Path(language["validation_file"]).read_text()
    documents = [text] if sample_by == "document" else text.split("\n")
    nats, tokens = by_hand(tmp_path / "run" / "model", documents, 12)
    characters = sum(map(len, documents))
    assert final["bits_per_character"] == pytest.approx(nats / math.log(2) / characters, rel=1e-6)
    assert final["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert final["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert tokens == characters + (sample_by == "line"), "a separator between two documents is predicted, too"
    start(language, per_device_eval_batch_size=64, overwrite_output_dir=True)
    assert results(tmp_path / "run")["final"]["noise_off"] == pytest.approx(final, rel=1e-6)


@pytest.mark.filterwarnings("ignore:this configuration was saved by a model with Gumbel attention")
def test_a_run_from_the_command_line_learns_and_leaves_what_it_takes_to_use_the_model(
    language: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "gpt2.json").write_text(json.dumps(GPT2))
    language |= {"model_config": str(tmp_path / "gpt2.json"), "max_train_steps": 20, "eval_steps": 20, "hard": True}
    language_model.main([f"--{key}={value}" for key, value in language.items()])
    found = results(tmp_path / "run")
    assert found["final"].keys() == {"noise_off", "noise_on"}
    assert found["final"]["noise_off"] != found["final"]["noise_on"]
    assert found["series"]["train"][-1]["loss"] < 0.9 * found["series"]["train"][0]["loss"]
    assert found["data"]["train_characters"] == found["data"]["train_tokens"] == len(TEXT)
    assert found["data"]["validation_characters"] == len(Path(language["validation_file"]).read_text())
    assert found["data"]["train_blocks"] == math.ceil(len(TEXT) / 12)
    folder = tmp_path / "run" / "model"
    model, tokenizer = ga.from_pretrained(AutoModelForCausalLM, folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert ga.patch_of(model).tau[0].item() == pytest.approx(0.5)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert sum(parameter.numel() for parameter in model.parameters()) == found["parameters"]
    changes = {"model_config": None, "tokenizer_name": None, "model_name_or_path": str(folder)}
    changes |= {"learning_rate": 1e-9, "max_train_steps": 1, "tau": 0.5, "output_dir": str(tmp_path / "2")}
    again = start(language, **changes)
    assert again.final["noise_off"] == pytest.approx(found["final"]["noise_off"], rel=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    language: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    if streaming:
        language |= stream_of(tmp_path) | {"max_train_steps": 6, "gradient_accumulation_steps": 2}
    start(language, output_dir=str(tmp_path / "whole"))
    stop_at_batch(3, language, monkeypatch)
    record = start(language, resume_from_checkpoint="latest")
    assert record.resumed_at == [2 if streaming else 3]
    assert record.steps == 6
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_stream_of_other_texts_is_refused_on_resuming(
    language: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language |= stream_of(tmp_path) | {"max_train_steps": 4}
    stop_at_batch(1, language, monkeypatch)
    (tmp_path / "train.txt").write_text(TEXT.replace("be", "do"))
    with pytest.raises(UsageError, match=r"another configuration.*data\.train_sha256"):
        start(language, resume_from_checkpoint="latest")


def test_tokens_are_cached_and_mapped(
    language: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = LanguageModelArguments(**language)
    documents, _ = load_documents(args)
    encoded = language_modelling.encode(documents, character_tokenizer(documents))
    assert encoded.cache_files
    pieces = list(language_modelling.pieces(encoded))
    assert [len(piece) for piece in pieces] == [len(TEXT) + 1]
    assert not pieces[0].flags.owndata

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(language_modelling, "_encode_batch", refuse)
    again, _ = load_documents(args)
    tokenizer = character_tokenizer(again)
    language_modelling.encode(again, tokenizer)
    tokenizer.add_tokens(["question"])
    with pytest.raises(AssertionError, match="tokenised again"):
        language_modelling.encode(again, tokenizer)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_of_tables_are_documents_and_empty_ones_are_none(
    language: dict[str, Any], tmp_path: Path, suffix: str
) -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"words": ["one two", "", "three", "four five six, seven eight"], "other": [1, 2, 3, 4]})
    path = tmp_path / f"table.{suffix}"
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](str(path))
    language |= {"train_file": str(path), "validation_file": None, "text_column": "words"}
    args = LanguageModelArguments(**language, validation_split_percentage=25)
    train, validation = load_documents(args)
    tokenizer = character_tokenizer(train)
    assert validation.rows["words"][:] == ["four five six, seven eight"]
    encoded = language_modelling.encode(train, tokenizer)
    text = "".join(tokenizer.decode(list(PackedBlocks(language_modelling.pieces(encoded), 5)[0]["tokens"])))
    assert text == "<|endoftext|>one t"
    assert sum(encoded["characters"]) == 12


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_with_splits(language: dict[str, Any], tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split, texts in {"train": TEXT.split("\n"), "validation": ["to be", "not to be"]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if streaming:
        language |= stream_of(tmp_path)
    language |= {"train_file": None, "validation_file": None, "dataset_name": str(folder), "max_train_steps": 1}
    start(language, max_train_samples=4, attention="unpatched")
    data = results(tmp_path / "run")["data"]
    assert data["validation_characters"] == 14
    assert data["validation_tokens"] == 15
    if not streaming:
        assert data["train_characters"] == len("".join(TEXT.split("\n")[:4]))
    with pytest.raises(UsageError, match="has no column 'words'"):
        start(language, text_column="words", overwrite_output_dir=True)


def test_the_split_of_one_text_is_where_the_percentage_says(language: dict[str, Any]) -> None:
    language |= {"validation_file": None, "validation_split_percentage": 10}
    train, validation = load_documents(LanguageModelArguments(**language))
    first, last = train.cut(train.rows[0]["text"]), validation.cut(validation.rows[0]["text"])
    assert first + last == TEXT
    assert len(first) == len(TEXT) * 9 // 10


def texts_of(settings: dict[str, Any], **changes: Any) -> list[str]:
    """What is trained on and what is evaluated on, documents joined by newlines."""
    parts = load_documents(LanguageModelArguments(**{**settings, **changes}))
    return ["\n".join(map(part.cut, part.rows[part.column])) for part in parts]


@pytest.mark.parametrize("share", [1, 33, 99])
@pytest.mark.parametrize("sample_by", ["document", "line"])
def test_held_out_text_lies_between_that_of_training_and_validation(
    language: dict[str, Any], sample_by: str, share: int
) -> None:
    language |= {"validation_file": None, "validation_split_percentage": 15, "sample_by": sample_by}
    whole, validation = texts_of(language)
    train, held = texts_of(language, holdout_percentage=share)
    if sample_by == "document":
        assert train + held == whole
        assert train + held + validation == TEXT
        assert len(train) == len(TEXT) * 85 // 100 * (100 - share) // 100
    else:
        assert f"{train}\n{held}" == whole
        assert f"{train}\n{held}\n{validation}\n" == TEXT
    assert train
    assert held


def test_validation_data_are_not_read_where_training_data_are_held_out(
    language: dict[str, Any], tmp_path: Path
) -> None:
    language |= {"holdout_percentage": 20, "attention": "unpatched"}
    for number, file in enumerate((language["validation_file"], str(tmp_path / "nowhere.txt"), None)):
        run = tmp_path / f"run{number}"
        start(language, validation_file=file, output_dir=str(run))
        held = len(TEXT) - len(TEXT) * 80 // 100
        assert results(run)["data"]["validation_characters"] == held
        assert results(run)["data"]["train_characters"] == len(TEXT) - held
    assert len({json.dumps(results(tmp_path / f"run{number}")["final"]) for number in range(3)}) == 1
    with pytest.raises(UsageError, match=r"nowhere\.txt.*no such file"):
        start(language, holdout_percentage=None, validation_file=str(tmp_path / "nowhere.txt"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in "abcde"))
    hub = {"train_file": None, "validation_file": None, "dataset_name": str(folder)}
    assert texts_of(language, **hub) == ["a\nb\nc\nd", "e"]
    with pytest.raises(UsageError, match="split 'validation' cannot be loaded"):
        texts_of(language, **hub, holdout_percentage=None)


def test_documents_are_held_out_of_the_first_so_many(language: dict[str, Any]) -> None:
    language |= {"sample_by": "line", "validation_split_percentage": 20, "validation_file": None}
    first, second, blank, *_ = TEXT.split("\n")
    held = {"holdout_percentage": 34}
    assert texts_of(language, **held, max_train_samples=3) == [first, f"{second}\n{blank}"]
    assert texts_of(language, **held, max_train_samples=3, max_eval_samples=1) == [first, second]
    cut = len(first) * 66 // 100
    assert texts_of(language, **held, max_train_samples=1) == [first[:cut], first[cut:]]


def test_parts_of_one_text_are_cached_apart(language: dict[str, Any]) -> None:
    language |= {"validation_file": None, "validation_split_percentage": 50}
    parts = [
        part
        for share in (None, 50, 20)
        for part in load_documents(LanguageModelArguments(**language, holdout_percentage=share))
    ]
    tokenizer = character_tokenizer(parts[0])
    encoded = [language_modelling.encode(part, tokenizer) for part in parts]
    half = len(TEXT) // 2
    quarter, most = half * 50 // 100, half * 80 // 100
    sizes = [half, len(TEXT) - half, quarter, half - quarter, most, half - most]
    assert [sum(split["characters"]) for split in encoded] == sizes
    assert len({split._fingerprint for split in encoded}) == len(parts)


def test_unknown_characters_are_counted_and_told(
    language: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dev.txt").write_text("to be 100 % sure", encoding="utf-8")
    start(language, max_train_steps=1)
    assert "dev.txt: 4 tokens are unknown to the tokenizer" in capsys.readouterr().out


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model_config": None}, "one of model_name_or_path"),
    "two models": ({"model_name_or_path": "gpt2"}, "one of model_name_or_path"),
    "no tokenizer": ({"tokenizer_name": None}, "model_config needs tokenizer_name"),
    "no data": ({"train_file": None}, "one of train_file and dataset_name"),
    "no validation": ({"validation_file": None}, "nothing to evaluate on"),
    "endless": ({"streaming": True}, "streaming needs max_train_steps"),
    "stream of characters": ({"streaming": True, "max_train_steps": 2}, "reads the whole training text first"),
    "stream of one": (
        {"streaming": True, "max_train_steps": 2, "tokenizer_name": "gpt2"},
        "choose 'paragraph' or 'line'",
    ),
    "stream split": (
        {"streaming": True, "max_train_steps": 2, "validation_file": None, "validation_split_percentage": 5},
        "the length of a stream is not known",
    ),
    "stream held out": (
        {"streaming": True, "max_train_steps": 2, "holdout_percentage": 5},
        "streaming excludes holdout_percentage",
    ),
    "nothing held out": ({"holdout_percentage": 0}, "holdout_percentage must be from 1 to 99"),
    "all held out": ({"holdout_percentage": 100}, "holdout_percentage must be from 1 to 99"),
    "held out of nothing": (
        {"train_file": "{tmp}/empty.jsonl", "holdout_percentage": 5},
        "empty.jsonl, held-out 5 % is empty: expected at least one document",
    ),
    "block": ({"block_size": 17}, r"block_size 17 is more than the 16 positions .*raise them in model_config"),
    "tiny block": ({"block_size": 1}, "block_size must be >= 2"),
    "model type": ({"model_config": {"n_layer": 2}}, "expected a mapping with the key model_type"),
    "setting": ({"model_config": GPT2 | {"n_layers": 2}}, "gpt2 has no setting 'n_layers'"),
    "heads": ({"model_config": GPT2 | {"n_head": 3}}, "no causal language model can be made of it"),
    "vocabulary": ({"model_config": GPT2 | {"vocab_size": 9}}, "the tokenizer has .* tokens, the model only 9"),
    "bidirectional": (
        {
            "model_config": {
                "model_type": "bert",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
            }
        },
        "BertLMHeadModel is not causal",
    ),
    "missing": ({"train_file": "nowhere.txt"}, "train_file 'nowhere.txt': no such file"),
    "suffix": ({"train_file": "text.pdf"}, "expected a file ending in .txt"),
    "empty": ({"train_file": "{tmp}/empty.txt"}, "train_file .*empty.txt' is empty"),
    "empty validation": ({"validation_file": "{tmp}/empty.txt"}, "validation_file .*empty.txt' is empty"),
    "no words": ({"train_file": "{tmp}/empty.jsonl"}, "empty.jsonl is empty: expected at least one document"),
    "short": ({"train_file": "{tmp}/short.txt"}, "short.txt has 5 tokens to predict, fewer than one block of 12"),
    "bytes": ({"train_file": "{tmp}/latin.txt"}, r"latin.txt' cannot be read as text: .*codec can't decode"),
    "column": ({"train_file": "{tmp}/rows.jsonl"}, r"has no column 'text'; its columns are \['words'\]"),
    "numbers": ({"train_file": "{tmp}/rows.jsonl", "text_column": "words"}, "'words' holds int, expected text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_message_before_anything_is_written(
    language: dict[str, Any], tmp_path: Path, case: str
) -> None:
    for name, content in {
        "empty.txt": b"",
        "empty.jsonl": b'{"text": ""}\n',
        "short.txt": b"to be",
        "latin.txt": "d\u00e9j\u00e0 vu".encode("latin-1"),
        "rows.jsonl": b'{"words": 1}\n',
    }.items():
        (tmp_path / name).write_bytes(content)
    changes, message = BAD[case]
    changes = {
        key: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(UsageError, match=message):
        start(language, **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(language: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "train.txt").chmod(0)
    with pytest.raises(UsageError, match=r"train.txt' cannot be read: Permission denied"):
        start(language)
