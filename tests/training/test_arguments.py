from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from gumbel_attention.config import ESTIMATORS, IMPLS
from harness.arguments import FinetuneArguments
from harness.attention import attention_config
from harness.errors import UsageError
from harness.parsing import from_mapping, parse_arguments

FILES = ["--train_file", "a.tsv", "--validation_file", "b.tsv"]


@dataclass(frozen=True)
class Small:
    name: str
    rate: float = 0.5
    count: int = 3
    flag: bool = False
    kind: Literal["no", "some"] = "no"
    limit: int | None = 7
    layers: tuple[int | str, ...] | None = None
    note: str | None = field(default=None, metadata={"help": "100% optional"})


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def test_command_line_wins_over_file_and_file_over_default(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "name: file\ncount: 4\n")
    assert parse_arguments(Small, ["--config", config]) == Small("file", count=4)
    both = parse_arguments(Small, ["--config", config, "--count", "5", "--rate", "1e-3"])
    assert both == Small("file", count=5, rate=1e-3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--flag"], {"flag": True}),
        (["--flag", "false"], {"flag": False}),
        (["--kind", "no"], {"kind": "no"}),
        (["--limit", "null"], {"limit": None}),
        (["--layers", "0,2,cross"], {"layers": (0, 2, "cross")}),
        (["--layers", "-1"], {"layers": (-1,)}),
        (["--layers=[0, 1]"], {"layers": (0, 1)}),
        (["--note", "12"], {"note": "12"}),
        (["--rate=2"], {"rate": 2.0}),
    ],
)
def test_command_line_values(words: list[str], expected: dict[str, Any]) -> None:
    assert parse_arguments(Small, ["--name", "x", *words]) == Small("x", **expected)


@pytest.mark.parametrize("text", ["rate: 1e-5", "rate: 1.0e-5", "rate: '1e-5'"])
def test_yaml_numbers_without_a_dot_are_floats(tmp_path: Path, text: str) -> None:
    config = write(tmp_path / "c.yaml", f"name: x\n{text}\n")
    assert parse_arguments(Small, ["--config", config]).rate == 1e-5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("count", 2.5, "count in test: expected int, got 2.5 of type float"),
        ("count", True, "expected int, got True"),
        ("rate", "fast", "expected float, got 'fast' of type str"),
        ("rate", "nan", "expected float, got 'nan'"),
        ("name", 3, "expected str, got 3 of type int"),
        ("flag", "yes", "expected bool, got 'yes'"),
        ("kind", False, "expected one of no|some, got False.*quote the word"),
        ("kind", "all", r"expected one of no\|some, got 'all'"),
        ("limit", "seven", "expected int or null, got 'seven'"),
        ("layers", [1.5], "expected int or str, got 1.5"),
        ("rate", None, "expected float, got None"),
    ],
)
def test_wrong_types_say_expected_and_got(key: str, value: Any, message: str) -> None:
    message = message.replace("no|some, got F", r"no\|some, got F")
    with pytest.raises(UsageError, match=message):
        from_mapping(Small, {"name": "x", key: value}, "in test")


def test_unknown_key_in_file_is_refused_with_the_nearest_and_the_list(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "nmae: x\n")
    with pytest.raises(UsageError, match=r"unknown setting nmae in .*c\.yaml.*mean name\?.*count, flag, kind"):
        parse_arguments(Small, ["--config", config])


@pytest.mark.parametrize("words", [["--cuont", "3"], ["--cuont=3"]])
def test_unknown_key_on_the_command_line_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"unknown setting --cuont on the command line.*mean --count\?.*flag"):
        parse_arguments(Small, ["--name", "x", *words])


def test_abbreviations_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown setting --coun"):
        parse_arguments(Small, ["--name", "x", "--coun", "3"])


def test_missing_setting_is_named() -> None:
    with pytest.raises(UsageError, match="missing required settings: name"):
        parse_arguments(Small, [])


def test_variables_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_DIR", "/data")
    config = write(tmp_path / "c.yaml", "name: ${SOME_DIR}/train.tsv\n")
    assert parse_arguments(Small, ["--config", config]).name == "/data/train.tsv"


def test_unset_variable_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_DIR", raising=False)
    config = write(tmp_path / "c.yaml", "name: ${SOME_DIR}/train.tsv\n")
    with pytest.raises(UsageError, match=r"name in .* uses the environment variable SOME_DIR, which is not set"):
        parse_arguments(Small, ["--config", config])
    assert parse_arguments(Small, ["--config", config, "--name", "own"]).name == "own", "what it is in does not count"


@pytest.mark.parametrize(
    ("content", "message"), [("- a\n", "must hold a mapping"), ("a: [", "not valid YAML"), (None, "cannot read")]
)
def test_unusable_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message):
        parse_arguments(Small, ["--config", str(path)])


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(FinetuneArguments, ["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in FinetuneArguments.__dataclass_fields__)
    words = " ".join(text.split())
    for default in ("(default: 5.0e-05)", "(default: gumbel)", "(default: runs/finetune)", "(default: null)"):
        assert default in words
    assert f"--impl str of the attention: {enumeration(IMPLS)} (default: auto)" in words
    assert f"gradient of a hard choice: {enumeration(ESTIMATORS)}; null" in words


def enumeration(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "0"], "learning_rate must be > 0, got 0.0"),
        (["--max_train_samples", "0"], "max_train_samples must be > 0"),
        (["--seed", "-1"], "seed must be >= 0"),
        (["--warmup_ratio", "1"], r"warmup_ratio must be in \[0, 1\)"),
        (["--warmup_ratio", "0.1", "--num_warmup_steps", "5"], "exclude each other"),
        (["--dataset_name", "x"], "dataset_name excludes"),
        (["--tau_end", "0.5"], "tau_schedule is constant"),
        (["--tau_schedule", "linear"], "needs tau_end"),
        (["--tau_schedule", "clipped_exponential", "--tau_end", "0.5"], "needs tau_rate"),
        (
            ["--tau_schedule", "clipped_exponential", "--tau_end", "2.0", "--tau_rate", "0.1"],
            "falls from tau to tau_end",
        ),
        (["--tau_schedule", "linear", "--tau_end", "0.5", "--tau_rate", "0.1"], "belong to tau_schedule=clipped_exp"),
        (["--tau_schedule", "linear", "--tau_end", "0.5", "--learn_tau", "head"], "learned or scheduled"),
        (["--checkpointing_steps", "0"], "checkpointing_steps must be > 0 or 'epoch', got 0"),
        (["--checkpointing_steps", "epochs"], "checkpointing_steps must be > 0 or 'epoch', got 'epochs'"),
        (["--checkpointing_steps", "2.5"], "checkpointing_steps: expected int or str or null, got 2.5"),
        (["--keep_last", "0"], "keep_last must be > 0, got 0"),
        (["--max_eval_samples", "0"], "max_eval_samples must be > 0, got 0"),
        (["--overwrite_output_dir", "--resume_from_checkpoint", "latest"], "exclude each other: the one removes"),
    ],
)
def test_settings_that_contradict_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_arguments(FinetuneArguments, [*FILES, *words])


@pytest.mark.parametrize(("text", "expected"), [("500", 500), ("epoch", "epoch"), ("null", None)])
def test_checkpoints_by_steps_or_epochs(tmp_path: Path, text: str, expected: Any) -> None:
    assert parse_arguments(FinetuneArguments, [*FILES, "--checkpointing_steps", text]).checkpointing_steps == expected
    config = write(tmp_path / "c.yaml", f"checkpointing_steps: {text}\n")
    assert parse_arguments(FinetuneArguments, [*FILES, "--config", config]).checkpointing_steps == expected


def test_data_must_be_given() -> None:
    with pytest.raises(UsageError, match="no data: give dataset_name, or both"):
        parse_arguments(FinetuneArguments, ["--train_file", "a.tsv"])


def test_the_library_checks_the_attention_settings() -> None:
    args = parse_arguments(FinetuneArguments, [*FILES, "--noise", "gumble"])
    with pytest.raises(UsageError, match=r"attention settings: noise .*gumbel"):
        attention_config(args)


def test_resolved_settings_can_be_read_again(tmp_path: Path) -> None:
    args = parse_arguments(FinetuneArguments, [*FILES, "--layers", "0,cross", "--noise", "none", "--tau", "2"])
    config = write(tmp_path / "c.yaml", yaml.safe_dump(args.to_dict()))
    assert parse_arguments(FinetuneArguments, ["--config", config]) == args
