"""The rows of a study: reading them, refusing what is damaged or mixed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from studies import VERSIONS, row_of, write_rows, write_study

from harness.errors import UsageError
from study.folder import write_study as write_study_file
from study.plan import load_study
from study.rows import is_row, load_row, read_rows, write_row


def test_a_row_says_what_its_run_measured(tmp_path: Path) -> None:
    write_rows(tmp_path / "runs", [row_of("soft", 1)])
    row = read_rows(tmp_path)[0]
    assert (row.id, row.arm, row.seed, row.modes) == ("soft-seed1-00000000", "soft", 1, ["noise_off", "noise_on"])
    assert row.metric("noise_on", "accuracy") == 0.5
    assert (row.commit, row.dirty, row.device, row.versions) == ("c" * 40, False, "cpu (fake)", VERSIONS)
    assert (row.seconds, row.config, row.train_series, row.evaluation_series) == (3.0, {"seed": 1}, [], [])
    assert row.differs == ()
    with pytest.raises(UsageError, match="not evaluated with mode 'hard': it has noise_off, noise_on"):
        row.metric("hard", "accuracy")
    with pytest.raises(UsageError, match="no metric 'bleu' in mode 'noise_off': it has accuracy, loss"):
        row.metric("noise_off", "bleu")


def test_rows_come_in_the_order_of_the_plan_and_no_others(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    content = [row_of(run.arm, run.seed, id=run.id) for run in study.runs]
    write_rows(tmp_path / "out" / "runs", [*content[1:], row_of("earlier", 0)])
    assert [row.arm for row in read_rows(tmp_path / "out")] == ["earlier", "plain", "plain", "soft"]
    write_study_file(study)
    assert [row.id for row in read_rows(tmp_path / "out")] == [run.id for run in study.runs[1:]]
    assert read_rows(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {**VERSIONS, "torch": "2.14"}}, r"torch: 2\.13 \(2 rows\), 2\.14 \(1 rows\)"),
        ({"versions": {**VERSIONS, "gumbel_attention": "0.2"}}, "gumbel_attention: 0.1"),
        ({"git": {"commit": "d" * 40, "dirty": False}}, f"commit: {'c' * 40}"),
        ({"git": None}, "None"),
        ({"git": {"commit": "c" * 40, "dirty": True}}, f"{'c' * 40} with changes"),
        ({"earlier_git": [{"commit": "d" * 40, "dirty": False}]}, f"{'d' * 40}, then {'c' * 40}"),
        ({"device": "NVIDIA H100"}, "NVIDIA H100"),
    ],
)
def test_mixed_rows_are_refused_unless_told_and_marked(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    write_rows(tmp_path / "runs", [row_of("a", 0), row_of("a", 1), row_of("a", 2, **change)])
    with pytest.raises(UsageError, match=words):
        read_rows(tmp_path)
    rows = read_rows(tmp_path, allow_mixed=True)
    assert [len(row.differs) for row in rows] == [0, 0, 1]


def test_other_packages_do_not_make_rows_mixed(tmp_path: Path) -> None:
    write_rows(tmp_path / "runs", [row_of("a", 0), row_of("a", 1, versions={**VERSIONS, "python": "3.12"})])
    assert [row.differs for row in read_rows(tmp_path)] == [(), ()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ('{"id": ', "is not the row"),
        ("[]", "expected a JSON object"),
        ("{}", "it has no id, study, arm, seed"),
        (json.dumps(row_of("a", 0, schema_version=2)), "schema_version 2, this program reads 1"),
        (json.dumps(row_of("a", 0, status="running")), "its status is 'running'"),
        (json.dumps(row_of("a", 1)), "it is that of 'a-seed1-00000000'"),
    ],
)
def test_what_is_no_row(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "runs" / "a-seed0-00000000.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_rows(tmp_path)
    assert not is_row(path)


def test_a_row_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs" / "a-seed0-00000000.json"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f".{path.name}.0123.tmp").write_text("half of one that was killed")
    write_row(path, row_of("a", 0))
    with pytest.raises(ValueError, match="Out of range float"):
        write_row(path, row_of("a", 0, train_seconds=float("nan")))

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_row(path, row_of("a", 0, train_seconds=9.0))
    assert load_row(path).content == row_of("a", 0)
    assert os.listdir(tmp_path / "runs") == [path.name]
