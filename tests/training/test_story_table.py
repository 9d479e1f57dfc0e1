"""The table of story question answering runs: its numbers by hand, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.story_table import METRICS, main, read_runs, table

ROOT = Path(__file__).parents[2]


def write(folder: Path, name: str, off: float, on: float | None = None, **changes: Any) -> None:
    modes = {"noise_off": off} if on is None else {"noise_off": off, "noise_on": on}
    final = {
        mode: {metric: value - 0.1 * index for index, metric in enumerate(METRICS)} for mode, value in modes.items()
    }
    (folder / f"{name}.json").write_text(json.dumps({"status": "finished", "final": final, **changes}))


def test_rows_are_means_and_ranges_in_the_order_of_the_arms(tmp_path: Path) -> None:
    write(tmp_path, "qa2-gumbel-st-seed1", 0.9, 0.8)
    write(tmp_path, "qa2-gumbel-st-seed0", 0.8, 0.5)
    write(tmp_path, "qa2-another-seed0", 0.5)
    write(tmp_path, "qa2-softmax-seed0", 0.75)
    write(tmp_path, "qa1-det-st-seed3", 1.0)
    lines = table(read_runs(tmp_path)).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| qa1", "det-st", "3"], ["| qa2", "softmax", "0"], ["| qa2", "gumbel-st", "0, 1"], ["| qa2", "another", "0"],
    ]  # fmt: skip
    assert lines[3] == "| qa2 | softmax | 0 | 75.0 | - | 65.0 | - | 55.0 | - |"
    assert lines[4].startswith("| qa2 | gumbel-st | 0, 1 | 85.0 (80.0 to 90.0) | 65.0 (50.0 to 80.0) | 75.0 (70.0 to")
    assert {line.count("|") for line in lines} == {10}


def test_what_is_no_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        assert main(argv) == 2
        return capsys.readouterr().err

    assert "expected one folder, got 0 arguments" in refused()
    assert "no results in" in refused(str(tmp_path))
    write(tmp_path, "qa2-softmax-seed0", 0.5, status="running")
    assert "qa2-softmax-seed0.json: expected the results of a finished run" in refused(str(tmp_path))
    write(tmp_path, "qa2-softmax-seed0", 0.5)
    assert main([str(tmp_path)]) == 0
    assert "| qa2 | softmax | 0 |" in capsys.readouterr().out
    write(tmp_path, "softmax", 0.5)
    assert "softmax.json: expected a name such as qa2-gumbel-st-seed0.json" in refused(str(tmp_path))


def test_the_published_table_is_that_of_the_published_runs() -> None:
    folder = ROOT / "results" / "babi"
    assert table(read_runs(folder / "runs")) in (folder / "table.md").read_text(encoding="utf-8")
