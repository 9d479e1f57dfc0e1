"""What a user can get wrong: refused before minutes are spent, with what was expected and what came.

Beside what is here, test_classification, test_language_model, test_transduction, test_story_qa and test_babi have the
malformed files of each task, test_resume has checkpoints of other settings and full disks, test_nonfinite and
test_nonfinite_scripts have losses
that are not finite.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import data_of, run, write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

import finetune
from harness import models
from harness import results as results_module
from harness import run as run_module
from harness.arguments import FinetuneArguments
from harness.errors import UsageError
from tasks.classification import load_config, load_data

NO_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")


def refused(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs finetune.py, which must end with status 2 before it writes; what it says."""
    with pytest.raises(SystemExit) as stopped:
        finetune.main([f"--{key}={value}" for key, value in settings.items()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    return error[error.index("finetune.py: error: ") :]


@pytest.fixture
def nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr("harness.loop.TrainingLoop.run", fail)


@pytest.fixture
def no_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(finetune, "load_classifier", fail)


# Files of text classification


def as_rows(path: Path, column: list[Any], labels: list[Any]) -> str:
    Dataset.from_dict({"sentence": column, "label": labels}).to_parquet(path)
    return str(path)


FILES: dict[str, tuple[str, bytes | None, str]] = {
    "folder": ("bad.tsv", None, "a folder, expected a file"),
    "latin-1 header": ("bad.csv", "s\u00e9ntence,label\na,1\n".encode("latin-1"), "cannot be read as csv: .*decode"),
    "latin-1 rows": ("bad.csv", "sentence,label\nd\u00e9j\u00e0,1\nb,0\n".encode("latin-1"), "cannot be read as csv"),
    "header only": ("bad.csv", b"sentence,label\n", "is empty: expected at least one row"),
    "empty table": ("bad.csv", b"", "is empty: expected at least one row"),
    "empty json": ("bad.jsonl", b"", "is empty: expected at least one row"),
    "no parquet": ("bad.parquet", b"PAR1 or not", "cannot be read as parquet"),
    "empty parquet": ("bad.parquet", b"", "is empty: expected at least one row"),
}


@pytest.mark.usefixtures("no_weights_are_loaded")
@pytest.mark.parametrize("argument", ["train_file", "validation_file"])
@pytest.mark.parametrize("case", FILES)
def test_files_that_are_none(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, argument: str
) -> None:
    name, content, message = FILES[case]
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    found = refused(settings | {argument: path}, capsys)
    assert re.search(message, found), found
    assert name in found
    assert not Path(settings["output_dir"]).exists()


def test_a_table_without_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    path = as_rows(tmp_path / "none.parquet", ["a"], [1])
    Dataset.from_parquet(path).select([]).to_parquet(path)
    with pytest.raises(UsageError, match=r"none\.parquet.* is empty: expected at least one row"):
        data_of(settings, train_file=path, cache_dir=str(tmp_path / "other"))


@NO_ROOT
@pytest.mark.parametrize("ending", ["tsv", "jsonl", "parquet"])
def test_a_file_that_may_not_be_read(settings: dict[str, Any], tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"secret.{ending}"
    path.write_text("sentence\tlabel\na\t1\n")
    path.chmod(0)
    with pytest.raises(UsageError, match=r"secret.* cannot be read as \w+: Permission denied"):
        data_of(settings, train_file=str(path))


@pytest.mark.parametrize("ending", ["tsv", "jsonl", "parquet"])
def test_a_file_whose_opening_fails(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """As the one above, for those who run tests as root."""
    path = tmp_path / f"secret.{ending}"
    path.write_text("sentence\tlabel\na\t1\n")
    real = Path.open

    def opening(self: Path, *args: Any, **options: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", opening)
    with pytest.raises(UsageError, match=r"secret.* cannot be read as \w+: Permission denied"):
        data_of(settings, train_file=str(path))


@pytest.mark.parametrize(
    ("column", "labels", "message"),
    [
        ([1.5, float("nan")], [0, 1], "no text in column 'sentence' of row 2"),
        (["a", None], [0, 1], "no text in column 'sentence' of row 2"),
        (["a", "b"], [1.0, float("nan")], r"label 1\.0 in row 1 has type float"),
        (["a", "b"], [float("nan"), 1.0], "no label in column 'label' of row 1"),
        (["a", "b"], [1, None], "no label in column 'label' of row 2"),
        (["a", "b"], ["yes", None], "no label in column 'label' of row 2"),
    ],
)
def test_missing_texts_and_labels(
    settings: dict[str, Any], tmp_path: Path, column: list[Any], labels: list[Any], message: str
) -> None:
    path = as_rows(tmp_path / "rows.parquet", column, labels)
    for argument in ("train_file", "validation_file"):
        with pytest.raises(UsageError, match=message):
            data_of(settings, **{argument: path})


def test_all_labels_that_training_lacks_are_named_with_their_first_rows(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "foreign.tsv", [("a", 1), ("b", 2), ("c", "x"), ("d", 2)])
    with pytest.raises(
        UsageError, match=r"label '2' in row 2, label 'x' in row 3 are not among the training labels \['0', '1'\]"
    ):
        data_of(settings, validation_file=path)
    path = write_rows(tmp_path / "many.tsv", [("a", f"class {number}") for number in range(14)])
    with pytest.raises(UsageError, match=r"label 'class 9' in row 10 and 4 more labels are not"):
        data_of(settings, validation_file=path)


# Lengths, vocabularies


@pytest.mark.parametrize("pairs", [False, True])
def test_texts_that_are_cut_are_counted(settings: dict[str, Any], tmp_path: Path, pairs: bool) -> None:
    """Of four words and two special tokens; six tokens fit exactly. A pair has three special tokens."""
    four, more = "a dull film fine", "the warm plot with a weak film"
    rows: list[tuple[str, Any]] = [(four, 0), (more, 1), ("film", 0), (more, 0)]
    header, names = "sentence\tlabel", {}
    if pairs:
        rows = [(f"{text}\tfilm", label) for text, label in rows]
        header, names = "sentence\tother\tlabel", {"text_pair_column": "other"}
    path = write_rows(tmp_path / "long.tsv", rows, header)
    limit = 8 if pairs else 6
    args = FinetuneArguments(**settings | {"train_file": path, "validation_file": path, "max_length": limit} | names)
    lines: list[str] = []
    data = load_data(args, models.load_tokenizer(args.model_name_or_path), lines.append)
    assert lines == [f"{path}: 2 of 4 texts (50 %) are longer than {limit} tokens and are cut"] * 2
    assert max(map(len, data.train["input_ids"])) == limit
    assert "cut" not in data.train.column_names
    again: list[str] = []
    load_data(args, models.load_tokenizer(args.model_name_or_path), again.append)
    assert again == lines, "from the cache too"
    lines.clear()
    load_data(FinetuneArguments(**args.to_dict() | {"max_length": 12}), models.load_tokenizer(args.model_name_or_path))
    assert lines == []


def test_cut_texts_are_told_by_the_script(settings: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    run(settings, max_length=6, max_train_steps=1)
    out = capfd.readouterr().out
    assert re.search(r"train\.tsv: \d+ of 24 texts \(\d+ %\) are longer than 6 tokens and are cut", out)
    assert re.search(r"dev\.tsv: \d+ of 11 texts \(\d+ %\) are longer than 6 tokens and are cut", out)


@pytest.mark.usefixtures("no_weights_are_loaded")
def test_more_tokens_than_the_model_has_positions(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = refused(settings | {"max_length": 33, "train_file": "missing.tsv"}, capsys)
    assert "max_length 33 is more than the 32 positions of the model" in found
    assert "lower it to at most 32" in found
    assert "missing.tsv" in refused(settings | {"max_length": 32, "train_file": "missing.tsv"}, capsys)


def test_positions_that_are_counted_from_the_padding(settings: dict[str, Any], bert: str, tmp_path: Path) -> None:
    """A RoBERTa of 34 rows of positions takes 32 tokens: the claim is tested on the model itself."""
    folder = tmp_path / "roberta"
    shutil.copytree(bert, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = RobertaModel(RobertaConfig(vocab_size=16, max_position_embeddings=34, pad_token_id=1, **sizes))
    model.save_pretrained(folder)
    model(input_ids=torch.full((1, 32), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 33), 5))
    args = FinetuneArguments(**settings | {"model_name_or_path": str(folder), "max_length": 32})
    assert load_config(args).model_type == "roberta"
    with pytest.raises(UsageError, match="max_length 33 is more than the 32 positions"):
        load_config(FinetuneArguments(**args.to_dict() | {"max_length": 33}))


@pytest.mark.usefixtures("no_weights_are_loaded")
def test_a_tokenizer_of_more_tokens_than_the_model(
    settings: dict[str, Any], bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "grown"
    shutil.copytree(bert, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(folder)
    found = refused(settings | {"model_name_or_path": folder}, capsys)
    assert "has 17 tokens, the model only 16 (vocab_size): they do not belong together" in found


@pytest.mark.parametrize("end", ["[SEP]", None])
def test_a_tokenizer_without_padding(bert: str, tmp_path: Path, end: str | None) -> None:
    known = AutoTokenizer.from_pretrained(bert)
    bare = PreTrainedTokenizerFast(tokenizer_object=known.backend_tokenizer, unk_token="[UNK]", eos_token=end)
    bare.save_pretrained(tmp_path / "bare")
    if end is None:
        with pytest.raises(UsageError, match="neither a padding nor an end-of-text token"):
            models.load_tokenizer(str(tmp_path / "bare"))
    else:
        assert models.load_tokenizer(str(tmp_path / "bare")).pad_token == end


# Names that nothing has


@pytest.mark.usefixtures("no_weights_are_loaded")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": "nobody/no-such-model"}, "model_name_or_path 'nobody/no-such-model' cannot"),
        ({"model_name_or_path": "{tmp}/nowhere"}, "model_name_or_path .*nowhere' cannot be loaded"),
        ({"model_name_or_path": "{tmp}"}, "model_name_or_path .* cannot be loaded: .*config.json"),
        (
            {"dataset_name": "nobody/no-such-data"},
            "dataset_name 'nobody/no-such-data', split 'train' cannot be loaded",
        ),
        ({"dataset_name": "{tmp}/nowhere"}, "dataset_name .*nowhere.* cannot be loaded"),
    ],
)
def test_models_and_data_sets_that_are_not_there(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    changes = {key: value.replace("{tmp}", str(tmp_path)) for key, value in changes.items()}
    if "dataset_name" in changes:
        settings = {key: value for key, value in settings.items() if not key.endswith("_file")}
    assert re.search(message, refused(settings | changes, capsys))


@pytest.mark.usefixtures("no_weights_are_loaded")
def test_a_model_without_configuration(
    settings: dict[str, Any], bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer-only"
    shutil.copytree(bert, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    found = refused(settings | {"model_name_or_path": folder}, capsys)
    assert re.search(r"model_name_or_path .*tokenizer-only' cannot be loaded: .*config\.json", found)


@pytest.mark.parametrize("what", ["absent", "half"])
def test_a_model_without_weights(settings: dict[str, Any], bert: str, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "no-weights"
    shutil.copytree(bert, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100]) if what == "half" else weights.unlink()
    with pytest.raises(UsageError, match=r"model_name_or_path .*no-weights' cannot be loaded"):
        run(settings, model_name_or_path=str(folder))


# output_dir


@pytest.mark.usefixtures("nothing_is_trained", "no_weights_are_loaded")
@pytest.mark.parametrize("place", ["file", "file/run"])
@pytest.mark.parametrize("resume", [{}, {"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}])
def test_a_file_in_place_of_the_folder(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, resume: dict[str, Any]
) -> None:
    (tmp_path / "file").write_text("kept")
    found = refused(settings | resume | {"output_dir": tmp_path / place}, capsys)
    assert "output_dir" in found
    assert "file' is a file, expected a folder" in found
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.usefixtures("no_weights_are_loaded")
def test_a_folder_that_may_not_be_written(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module.os, "access", lambda path, mode: Path(path) != tmp_path)
    found = refused(settings | {"output_dir": tmp_path / "a" / "run"}, capsys)
    assert "cannot be written: no permission in" in found


# A full disk: checkpoints and models are in test_resume


@pytest.mark.parametrize("name", ["config.yaml", "results.json", "README.md"])
def test_no_space_left_for_small_files(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    real = Path.write_text

    def writing(self: Path, *args: Any, **options: Any) -> int:
        if name in self.name and self.suffix == ".tmp":
            real(self, "half")
            raise OSError(28, "No space left on device")
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", writing)
    words = [f"--{key}={value}" for key, value in settings.items()]
    with pytest.raises(SystemExit) as stopped:
        finetune.main([*words, "--save_model", "--max_train_steps=1", "--checkpointing_steps=1"])
    assert stopped.value.code == 1
    assert "finetune.py: error: no space left: " in capsys.readouterr().err
    assert results_module.read_results(tmp_path / "run") is None
    assert not list((tmp_path / "run").rglob(f"*{name}*tmp")), "nothing half written stays"
