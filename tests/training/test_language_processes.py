"""language_model.py on two processes, and what each of them reads of a stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import two_readers
import yaml
from accelerate.data_loader import prepare_data_loader
from interrupted import outcome
from language_runs import GPT2, TEXT, language_settings, results, start, stream_of
from transformers import AutoTokenizer

import language_model
from forked import run_in_two
from harness.errors import UsageError
from harness.saved_run import read_identity
from tasks import language_modelling
from tasks.language_arguments import LanguageModelArguments
from tasks.packing import PADDING_LABEL, PackedBlocks
from tasks.text_corpus import Documents, load_documents, share_of_stream

LINES = [chr(0x4E00 + number) * (number % 5 + 1) for number in range(23)]
"""Each of a character of its own."""


@pytest.fixture
def language(tmp_path: Path) -> dict[str, Any]:
    return language_settings(tmp_path)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(language: dict[str, Any], tmp_path: Path) -> None:
    """Without noise and dropout; 24 blocks in batches of 8, the last of them short, and four to evaluate on."""
    (tmp_path / "train.txt").write_text(TEXT[:-3])
    still = {f"{name}_pdrop": 0.0 for name in ("attn", "embd", "resid")}
    language |= {"model_config": GPT2 | still, "noise": "none", "max_grad_norm": 0.0, "block_size": 11}
    one = start(language, per_device_train_batch_size=8, output_dir=str(tmp_path / "one"))
    settings = LanguageModelArguments(**language).to_dict()
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings))
    run_in_two(language_model.main, [f"--config={tmp_path / 'two.yaml'}"], log=tmp_path / "log")
    two = results(tmp_path / "run")
    assert two["num_processes"] == 2
    assert [entry["loss"] for entry in two["series"]["train"]] == pytest.approx(
        [x["loss"] for x in one.train], abs=1e-6
    )
    assert two["final"]["noise_off"] == pytest.approx(one.final["noise_off"], rel=1e-5)


def stream(language: dict[str, Any], folder: Path, sizes: list[int], **changes: Any) -> LanguageModelArguments:
    """A data set of LINES in files of these numbers of lines, to be streamed in their order."""
    (folder / "train.txt").write_text("".join(LINES))
    language |= stream_of(folder) | {"train_file": None, "validation_file": None, "shuffle_buffer": 1}
    (folder / "set").mkdir()
    lines = iter(LINES)
    for number, size in enumerate(sizes):
        rows = [json.dumps({"text": next(lines)}) + "\n" for _ in range(size)]
        (folder / "set" / f"train-{number}.jsonl").write_text("".join(rows))
    (folder / "set" / "validation.jsonl").write_text(json.dumps({"text": "to be"}) + "\n")
    return LanguageModelArguments(**{**language, "dataset_name": str(folder / "set"), "max_train_steps": 5, **changes})


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([23], None, [LINES[0::2], LINES[1::2]]),
        ([15, 8], None, [LINES[:15], LINES[15:]]),
        ([15, 4, 4], None, [LINES[0::2], LINES[1::2]]),
        ([8, 5, 7, 3], None, [LINES[:8] + LINES[13:20], LINES[8:13] + LINES[20:]]),
        ([15, 8], 18, [LINES[0:18:2], LINES[1:18:2]]),
        ([23], 5, [LINES[0:5:2], LINES[1:5:2]]),
    ],
)
def test_every_document_of_a_stream_is_read_by_one_process(
    language: dict[str, Any], tmp_path: Path, sizes: list[int], count: int | None, expected: list[list[str]]
) -> None:
    """Whole files if as many or a multiple; else, and of the first so many documents, by documents."""
    train, _ = load_documents(stream(language, tmp_path, sizes, max_train_samples=count))
    shares = [share_of_stream(train, process, 2, whole_files=count is None) for process in (0, 1)]
    found = [[row["text"] for row in share.rows] for share in shares]
    assert found == expected
    assert sorted(found[0] + found[1]) == sorted(LINES[:count])


class Process:
    """What load_data asks of an accelerator."""

    num_processes = 2

    def __init__(self, process_index: int) -> None:
        self.process_index = process_index

    def print(self, *_: Any) -> None: ...


def tokens_of(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    """The inputs in order, and no padding."""
    assert not any((batch["labels"] == PADDING_LABEL).any() for batch in batches)
    return [token for batch in batches for token in batch["input_ids"].flatten().tolist()]


@pytest.mark.parametrize("sizes", [[23], [18, 5]])
def test_each_process_trains_on_its_share_pass_after_pass(
    language: dict[str, Any], tmp_path: Path, sizes: list[int]
) -> None:
    """Through Accelerate's loaders; as many batches for both, however long their shares."""
    args = stream(language, tmp_path, sizes, max_train_steps=60, max_eval_samples=1)
    train, validation = load_documents(args)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
    for index in (0, 1):
        data = language_modelling.load_data(args, train, validation, tokenizer, 12, Process(index))  # type: ignore[arg-type]  # all that is asked of it
        loader, _ = language_modelling.make_loaders(data, args, 12, 0, torch.Generator())
        found = list(prepare_data_loader(loader, num_processes=2, process_index=index))
        assert len(found) == 60
        share = share_of_stream(train, index, 2, whole_files=True)
        once = [[0, *tokenizer.encode(row["text"])] for row in share.rows]
        tokens = tokens_of(found)
        endless = [token for document in once for token in document] * (len(tokens) // sum(map(len, once)) + 2)
        assert tokens == endless[: len(tokens)]
        assert len(tokens) > 2 * sum(map(len, once)), "at least two passes"


@pytest.mark.slow
def test_a_stream_on_two_processes_goes_on_to_the_same_bits(language: dict[str, Any], tmp_path: Path) -> None:
    """Files of 20 documents and of three; shuffled, with noise and dropout."""
    args = stream(language, tmp_path, [20, 3], shuffle_buffer=3, gradient_accumulation_steps=2)
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(args.to_dict()))
    run_in_two(two_readers.main, tmp_path / "stream.yaml", log=tmp_path / "log")
    whole, resumed = tmp_path / "run", tmp_path / "resumed"
    seen = [torch.load(tmp_path / f"seen_{process}.pt") for process in (0, 1)]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
    for process in (0, 1):
        first, again = seen[process]["whole"], seen[process]["resumed"]
        assert (len(first), len(again)) == (10, 6)
        assert all(torch.equal(*pair) for pair in zip(first[4:], again, strict=True))
        share = LINES[20:] if process else LINES[:20]
        vocabulary = {token for line in share for token in tokenizer.encode(line)} | {tokenizer.eos_token_id}
        assert {token for batch in first for token in batch.flatten().tolist()} <= vocabulary
    assert outcome(resumed) == outcome(whole)
    assert results(resumed)["resumed_at_steps"] == [2]
    blocks = PackedBlocks(language_modelling.pieces(_encoded(args, tokenizer)), 12)
    assert results(whole)["data"]["validation_blocks"] == len(blocks)
    assert read_identity(whole / "checkpoint-2").data["stream_shares"] == 2
    in_one = {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 8}
    with pytest.raises(UsageError, match=r"data\.stream_shares: 2 -> None"):
        start(args.to_dict(), resume_from_checkpoint=str(whole / "checkpoint-2"), **in_one)


def _encoded(args: LanguageModelArguments, tokenizer: Any) -> Any:
    documents: Documents = load_documents(args)[1]
    return language_modelling.encode(documents, tokenizer)
