"""Claims in Markdown agree with the results, and a claim that drifted is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_folders import make_study, question

import report
from harness.errors import UsageError
from study.claims import _wrapped, drifted, read_blocks, update

ROOT = Path(__file__).parents[2]
EMPTY = "# Title\n\n<!-- claims:known -->\n<!-- /claims -->\n\nafter\n"


def value(arm: str, seed: int, mode: str) -> float:
    return 0.8 + 0.001 * (seed - 2) ** 2 + (0.05 + 0.0001 * seed if arm == "noisy" else 0.0)


def write_readme(folder: Path, text: str = EMPTY) -> Path:
    arms = {"plain": {"noise": "none"}, "noisy": {"noise": "gumbel"}}
    asked = [question("planted", "noisy", "plain")]
    make_study(folder / "results" / "known", value, arms, modes=("noise_off",), questions=asked)
    path = folder / "README.md"
    path.write_text(text)
    return path


def change_a_result(folder: Path) -> None:
    path = next((folder / "results" / "known" / "runs").glob("noisy-seed0-*"))
    row = json.loads(path.read_text())
    row["final"]["noise_off"]["accuracy"] += 0.01
    path.write_text(json.dumps(row))


def test_the_readme_says_what_the_results_say() -> None:
    assert drifted(ROOT / "README.md") == [], "run: python training/report.py --claims README.md"


def test_claims_are_written_once_and_stay(tmp_path: Path) -> None:
    path = write_readme(tmp_path)
    assert drifted(path) == ["known"]
    assert update(path) == ["known"]
    text = path.read_text()
    assert text.startswith("# Title\n\n<!-- claims:known -->\n")
    assert text.endswith("<!-- /claims -->\n\nafter\n")
    assert "| plain | 5 | 0.8020 ± " in text
    flat = " ".join(text.split())
    assert "- **Is it planted?** noisy is better than plain in accuracy (noise_off): +0.0502 (95 % interval" in flat
    assert "Seeds 0, 1, 2, 3, 4; 10 runs" in flat
    assert max(map(len, text.splitlines())) <= 119
    assert drifted(path) == []
    assert update(path) == []
    assert path.read_text() == text


def test_drift_is_found_on_either_side(tmp_path: Path) -> None:
    path = write_readme(tmp_path)
    update(path)
    text = path.read_text()
    path.write_text(text.replace("0.8020", "0.8120"))
    assert drifted(path) == ["known"]
    path.write_text(text)
    assert drifted(path) == []
    change_a_result(tmp_path)
    assert drifted(path) == ["known"]
    assert update(path) == ["known"]
    assert path.read_text() != text


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_readme(tmp_path)
    assert report.main(["--claims", str(path), "--check"]) == 1
    assert "does not say what the results say: known" in capsys.readouterr().err
    assert path.read_text() == EMPTY
    assert report.main(["--claims", str(path)]) == 0
    assert report.main(["--claims", str(path), "--check"]) == 0
    assert "agrees with the results" in capsys.readouterr().out


@pytest.mark.parametrize("length", range(100, 119))
def test_no_line_begins_a_list_by_chance(length: int) -> None:
    words = "x" * (length - 4)
    lines = _wrapped(f"{words} p = 1. A difference", "  ").splitlines()
    assert not any(line.strip().startswith("1.") for line in lines)
    assert " ".join(line.strip() for line in lines) == f"{words} p = 1. A difference"


def test_several_blocks_and_text_between_them(tmp_path: Path) -> None:
    path = write_readme(tmp_path, EMPTY + "between\n\n" + EMPTY)
    assert update(path) == ["known", "known"]
    blocks = read_blocks(path)
    assert blocks[0].text == blocks[1].text
    assert path.read_text().count("between") == 1


def test_mixed_versions_need_the_word(tmp_path: Path) -> None:
    path = write_readme(tmp_path)
    row_path = next((tmp_path / "results" / "known" / "runs").glob("noisy-seed0-*"))
    row = json.loads(row_path.read_text())
    row["device"] = "another"
    row_path.write_text(json.dumps(row))
    with pytest.raises(UsageError, match=r"claims:known.*mixed"):
        update(path)
    path.write_text(EMPTY.replace("known -->", "known allow_mixed -->"))
    assert update(path) == ["known"]
    assert "| noisy * |" in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- claims:known -->\ntext\n", "has no '<!-- /claims -->' after it"),
        ("<!-- claims:known -->\n<!-- claims:known -->\n<!-- /claims -->\n", "has no '<!-- /claims -->' after it"),
        ("text\n<!-- /claims -->\n", "0 markers open claims, 1 close them"),
        ("<!-- claims: known -->\n<!-- /claims -->\n", "1 markers open claims, 1 close them, and 0 are pairs"),
        ("see <!-- claims:known -->\n<!-- /claims -->\n", "and 0 are pairs"),
        ("no block\n", "has no block"),
        ("<!-- claims:unknown -->\n<!-- /claims -->\n", r"claims:unknown.*not the folder of a study"),
    ],
)
def test_markers_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = write_readme(tmp_path, text)
    with pytest.raises(UsageError, match=message):
        update(path)
    assert path.read_text() == text


def test_an_overview_puts_studies_side_by_side(tmp_path: Path) -> None:
    path = write_readme(tmp_path, "<!-- claims:overview known other -->\n<!-- /claims -->\n")
    arms = {"plain": {"noise": "none"}, "noisy": {"noise": "gumbel"}}
    asked = [question("planted", "plain", "noisy"), question("alone", "noisy", "plain")]
    make_study(tmp_path / "results" / "other", value, arms, modes=("noise_off",), questions=asked)
    assert update(path) == ["overview"]
    lines = path.read_text().splitlines()
    assert "| question | known: accuracy, higher is better | other: accuracy, higher is better |" in lines
    (row,) = [line for line in lines if line.startswith("| Is it")]
    assert row.split("|")[2].startswith(" **better** +0.0502 (+0.05 to +0.05)")
    assert row.split("|")[3].startswith(" **worse** -0.0502 (-0.05 to -0.05)")
    assert "paired by seed" in path.read_text()
    assert drifted(path) == []
    change_a_result(tmp_path)
    assert drifted(path) == ["overview"]


def test_an_overview_of_one_study_has_all_its_answers(tmp_path: Path) -> None:
    path = write_readme(tmp_path, "<!-- claims:overview known -->\n<!-- /claims -->\n")
    assert update(path) == ["overview"]
    rows = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    assert rows[2:] == ["| Is it planted? | **better** +0.0502 (+0.05 to +0.05) |"]


@pytest.mark.parametrize("words", ["overview", "known other", "overview allow_mixed"])
def test_an_overview_names_its_studies(tmp_path: Path, words: str) -> None:
    path = write_readme(tmp_path, f"<!-- claims:{words} -->\n<!-- /claims -->\n")
    with pytest.raises(UsageError, match="claims:overview NAME NAME"):
        update(path)


def test_an_overview_without_a_shared_question_is_refused(tmp_path: Path) -> None:
    path = write_readme(tmp_path, "<!-- claims:overview known other -->\n<!-- /claims -->\n")
    arms = {"plain": {"noise": "none"}, "noisy": {"noise": "gumbel"}}
    asked = [question("alone", "noisy", "plain")]
    make_study(tmp_path / "results" / "other", value, arms, modes=("noise_off",), questions=asked)
    with pytest.raises(UsageError, match="no question is asked by two of known, other"):
        update(path)
    make_study(tmp_path / "results" / "third", value, arms, modes=("noise_off",), questions=asked)
    path = write_readme(tmp_path, "<!-- claims:overview known other third -->\n<!-- /claims -->\n")
    with pytest.raises(UsageError, match="one of known, other, third asks no question of another"):
        update(path)
