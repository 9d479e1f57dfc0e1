"""ablate.py: what it takes on the command line, what it says, how it ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import STUDY, StubStarter, rows_in, write_study

import ablate
from study.plan import load_study
from study.rows import read_rows


def test_a_study_leaves_rows_a_copy_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate.main(["--config", write_study(tmp_path)], StubStarter()) == 0
    assert [(row.arm, row.seed) for row in read_rows(tmp_path / "out")] == [
        ("soft", 0),
        ("soft", 1),
        ("plain", 0),
        ("plain", 1),
    ]
    found = set(os.listdir(tmp_path / "out"))
    assert found >= {"study.yaml", "runs", "work", ".gitignore", "table.md"}
    assert "| soft | 2 | 0.5500 ± 0.6353 |" in (tmp_path / "out" / "table.md").read_text()
    out = capsys.readouterr().out
    assert "[0/4] soft seed 0: running" in out
    assert "| soft | 2 |" in out


def test_finished_runs_are_skipped(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    assert ablate.main(["--config", path, "--only", "plain"], StubStarter()) == 0
    second = StubStarter()
    assert ablate.main(["--config", path, "--seeds", "1"], second) == 0
    assert [name.rsplit("-", 1)[0] for name in second.started] == ["soft-seed1"]
    third = StubStarter()
    assert ablate.main(["--config", path], third) == 0
    assert [name.rsplit("-", 1)[0] for name in third.started] == ["soft-seed0"]


def test_a_failed_arm_ends_in_a_status_that_is_not_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starter = StubStarter(fail="soft")
    assert ablate.main(["--config", write_study(tmp_path)], starter) == 1
    assert len(starter.started) == 4
    error = capsys.readouterr().err
    assert error.count("failed: exit status 1") == 2
    assert "ValueError: the reason" in error
    assert "| soft | 0 | - | - |" in (tmp_path / "out" / "table.md").read_text()
    assert {row.arm for row in read_rows(tmp_path / "out")} == {"plain"}


def test_dry_run_runs_nothing_and_estimates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starter, path = StubStarter(), write_study(tmp_path)
    assert ablate.main(["--config", path, "--dry_run"], starter) == 0
    assert starter.started == []
    assert not (tmp_path / "out").exists()
    out = capsys.readouterr().out
    assert out.count("(to run)") == 4
    assert out.count("accelerate.commands.launch") == 4
    assert "4 runs, 0 finished, 4 to do\ntime left: unknown" in out
    assert ablate.main(["--config", path, "--only", "soft", "--seeds", "0"], starter) == 0
    planned = load_study(path).runs[0]
    row = json.loads(planned.row.read_text())
    planned.row.write_text(json.dumps({**row, "wall_seconds": 100.0}))
    capsys.readouterr()
    assert ablate.main(["--config", path, "--dry_run", "--jobs", "3"], starter) == 0
    out = capsys.readouterr().out
    assert "4 runs, 1 finished, 3 to do\ntime left with 3 at a time: about 2 min" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "sfot"], "'sfot', the study has soft, plain"),
        (["--seeds", "7"], "--seeds names '7', the study has 0, 1"),
        (["--output_dir", "{file}/out"], "cannot be used"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    words = [word.format(file=tmp_path / "file") for word in words]
    assert ablate.main(["--config", write_study(tmp_path), *words], StubStarter()) == 2
    assert message in capsys.readouterr().err


def test_jobs_are_at_least_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ablate.main(["--config", write_study(tmp_path), "--jobs", "0"])
    assert "expected at least 1" in capsys.readouterr().err


def test_another_study_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate.main(["--config", write_study(tmp_path)], StubStarter()) == 0
    other = write_study(tmp_path, arms={"soft": STUDY["arms"]["soft"], "third": {"tau": 4.0}})
    starter = StubStarter()
    assert ablate.main(["--config", other], starter) == 2
    assert "holds another study; these differ" in capsys.readouterr().err
    assert starter.started == []
    assert ablate.main(["--config", other, "--replace_plan"], starter) == 0
    assert [name.split("-")[0] for name in starter.started] == ["third", "third"]
    assert {row.arm for row in read_rows(tmp_path / "out")} == {"soft", "third"}


def test_a_study_of_another_script_and_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"model_name_or_path": "gpt2", "train_file": "a.txt", "validation_file": "b.txt"}
    path = write_study(tmp_path, base=base, script="language_model", metric="loss")
    assert ablate.main(["--config", path], StubStarter()) == 0
    out = capsys.readouterr().out
    assert "loss, noise off" in out
    assert out.count("1.0000") == 4  # two arms, two modes


def test_a_study_runs_through_accelerate_launch(settings: dict[str, Any], tmp_path: Path) -> None:
    """Nothing stands in for anything: one run of finetune.py."""
    own = ("output_dir",)
    base = {key: value for key, value in settings.items() if key not in own} | {"max_train_steps": 2}
    plan = {"base": base, "arms": {"st": {"hard": True}}, "seeds": [3], "output_dir": str(tmp_path / "out")}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert ablate.main(["--config", str(tmp_path / "plan.yaml")]) == 0
    row = read_rows(tmp_path / "out")[0]
    assert (row.arm, row.seed, row.content["steps"]) == ("st", 3, 2)
    assert row.device.startswith("cpu")
    assert row.modes == ["noise_off", "noise_on"]
    assert row.metric("noise_off", "accuracy") >= 0.0
    assert row.config["hard"] is True
    assert row.seconds > row.content["train_seconds"]
    assert len(rows_in(tmp_path / "out")) == 1
    assert os.listdir(tmp_path / "out" / "work") == []
