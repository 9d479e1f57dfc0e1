"""A study run again is compared with the intervals its committed rows state."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from studies import StubStarter, write_study

import ablate
import reproduce
from study.process import threads_per_run


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_per_run(1) == 1


def measured(settings: dict[str, Any]) -> float:
    return 0.5 + 0.1 * float(settings["seed"])


def run_again(folder: Path, value: Any, capsys: pytest.CaptureFixture[str], **changes: Any) -> tuple[int, str]:
    config = write_study(folder, **changes)
    against = folder / "committed"
    if not against.exists():
        assert ablate.main(["--config", config, "--output_dir", str(against)], StubStarter(value=measured)) == 0
    capsys.readouterr()
    words = ["--config", config, "--against", str(against), "--output_dir", str(folder / "again")]
    status = reproduce.main(words, StubStarter(value=value))
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_the_same_values_are_inside_and_equal_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run_again(tmp_path, measured, capsys)
    assert status == 0
    assert "4 of 4 means inside; 8 of 8 values equal to the bit." in text
    half = stats.t.ppf(0.975, 1) * 0.05  # of 0.5 and 0.6
    assert f"| soft | noise_on | {0.55 - half:.4f} to {0.55 + half:.4f} | 0.5500 | yes | 2 of 2 |" in text


@pytest.mark.parametrize(("shift", "status"), [(0.6, 0), (0.7, 1), (-0.7, 1)])
def test_a_mean_outside_the_interval_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shift: float, status: int
) -> None:
    def shifted(settings: dict[str, Any]) -> float:
        return measured(settings) + shift * (settings["noise"] == "none")

    got, text = run_again(tmp_path, shifted, capsys)
    assert got == status
    assert text.count("**no**") == 2 * status
    assert ("2 of 4 means inside; 4 of 8" in text) == bool(status)


def test_a_study_of_other_arms_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_again(tmp_path, measured, capsys)
    (tmp_path / "other").mkdir()
    (tmp_path / "committed").rename(tmp_path / "other" / "committed")
    status, text = run_again(tmp_path / "other", measured, capsys, arms={"soft": {"noise": "gumbel"}})
    assert status == 2
    assert "holds another study than the one to compare with" in text
    assert "arms.plain.noise: 'none' -> '(not there)'" in text


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"train_file": "/else/where/a.tsv"}, 0),
        ({"train_file": "/else/where/c.tsv"}, 2),
        ({"model_name_or_path": "else/where"}, 2),
    ],
)
def test_data_may_have_moved_and_keep_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], status: int
) -> None:
    base = {"train_file": "data/a.tsv", "validation_file": "data/b.tsv", "model_name_or_path": "some/where"}
    run_again(tmp_path, measured, capsys, base=base)
    shutil.rmtree(tmp_path / "again")
    got, text = run_again(tmp_path, measured, capsys, base=base | changed)
    assert got == status, text
    assert ("holds another study" in text) == bool(status)


def test_what_was_there_before_is_counted_and_the_stated_rows_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_again(tmp_path, measured, capsys)
    status, text = run_again(tmp_path, measured, capsys)
    assert status == 0
    assert "8 of 8 values equal to the bit. 4 of 4 runs were there from an earlier call." in text
    same = str(tmp_path / "committed")
    words = ["--config", write_study(tmp_path), "--against", same, "--output_dir", same]
    assert reproduce.main(words, StubStarter(value=measured)) == 2
    assert "nothing would run again" in capsys.readouterr().err


def test_a_failed_run_is_the_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_again(tmp_path, measured, capsys)
    words = ["--config", write_study(tmp_path), "--against", str(tmp_path / "committed")]
    assert reproduce.main([*words, "--output_dir", str(tmp_path / "third")], StubStarter(fail="soft")) == 1
