from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import ablate
from harness.ablation import Study, execute, launch_command, load_study, run_process
from harness.errors import UsageError
from harness.report import table, write_report
from harness.results import write_results

STUDY: dict[str, Any] = {
    "base": {"train_file": "a.tsv", "validation_file": "b.tsv", "tau": 2.0},
    "arms": {"soft": {"noise": "gumbel"}, "plain": {"noise": "none"}},
    "seeds": [0, 1],
}


def write_study(folder: Path, **changes: Any) -> str:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "output_dir": str(folder / "out"), **changes}, sort_keys=False))
    return str(path)


class StubRunner:
    """Stands in for the launched script: reads the arguments, writes results; may fail for one arm."""

    def __init__(self, fail: str = "", interrupt_at: int | None = None, silent: bool = False) -> None:
        self.fail, self.interrupt_at, self.silent = fail, interrupt_at, silent
        self.started: list[str] = []

    def __call__(self, command: Sequence[str], log: Path) -> int:
        settings = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text())
        folder = Path(settings["output_dir"])
        self.started.append(folder.name)
        log.write_text("starting\nValueError: the reason\n")
        if self.interrupt_at == len(self.started):
            raise ablate.Interrupted("stopped by SIGTERM")
        if self.fail and folder.name.startswith(self.fail):
            return 1
        if self.silent:
            return 0
        value = 0.5 + 0.1 * settings["seed"]
        final = {mode: {"accuracy": value, "loss": 1.0} for mode in ("noise_off", "noise_on")}
        write_results(folder, {"final": final, "train_seconds": 2.0})
        return 0


@pytest.fixture(autouse=True)
def _keep_signal_handlers() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def folders(study: Study) -> list[str]:
    return sorted(path.name for path in (study.output_dir / "runs").iterdir())


def test_runs_are_arms_times_seeds_with_stable_names(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    assert [(run.arm, run.seed) for run in study.runs] == [("soft", 0), ("soft", 1), ("plain", 0), ("plain", 1)]
    assert [run.args.noise for run in study.runs] == ["gumbel", "gumbel", "none", "none"]
    assert all(run.args.tau == 2.0 and run.args.seed == run.seed for run in study.runs)
    name = study.runs[0].name
    assert name.startswith("soft-seed0-")
    assert len(name.removeprefix("soft-seed0-")) == 8
    assert len({run.name for run in study.runs}) == 4
    again = load_study(write_study(tmp_path), output_dir=str(tmp_path / "elsewhere"))
    assert [run.name for run in again.runs] == [run.name for run in study.runs]
    other = load_study(write_study(tmp_path, base={**STUDY["base"], "tau": 3.0}))
    assert not {run.name for run in other.runs} & {run.name for run in study.runs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, r"unknown setting seed in .*mean seeds\?"),
        ({"arms": {"soft": {"nosie": "none"}}}, r"unknown setting nosie in arm 'soft' of .*mean noise\?"),
        ({"base": {"train_flie": "a"}}, r"unknown setting train_flie in base of .*mean train_file\?"),
        ({"arms": {"soft": {"noise": "gumble"}}}, "attention settings: noise"),
        ({"arms": {"soft": {"seed": 3}}}, "seed is set by the study"),
        ({"base": {"output_dir": "x"}}, "output_dir is set by the study"),
        ({"arms": {}}, "at least one arm"),
        ({"arms": {"a/b": {}}}, "name of an arm"),
        ({"arms": ["soft"]}, "expected a mapping"),
        ({"seeds": 3}, "expected a list of integers"),
        ({"seeds": []}, "expected a list of integers"),
        ({"seeds": [1, 1]}, "holds a seed twice"),
        ({"output_dir": None}, "expected a folder name"),
    ],
)
def test_mistakes_in_the_study_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_study(write_study(tmp_path, **changes))


def test_command_goes_through_accelerate_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_study(write_study(tmp_path)).runs[0]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = launch_command(run)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[command.index("--num_processes") + 1] == "1"
    assert command[command.index("--mixed_precision") + 1] == "no"
    assert "--cpu" in command
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "--cpu" not in launch_command(run)


def test_study_writes_table_summary_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, runner = write_study(tmp_path), StubRunner()
    assert ablate.main(["--config", path], runner) == 0
    study = load_study(path)
    assert folders(study) == sorted(run.name for run in study.runs)
    assert (study.output_dir / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((study.output_dir / "summary.json").read_text())
    assert [(arm["arm"], arm["seeds"]) for arm in summary["arms"]] == [("soft", [0, 1]), ("plain", [0, 1])]
    assert summary["arms"][0]["metric"]["noise_on"]["mean"] == pytest.approx(0.55)
    assert "| soft | 2 | 0.5500 ± 0.6353 |" in (study.output_dir / "table.md").read_text()
    assert "| soft | 2 |" in capsys.readouterr().out


def test_finished_runs_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path)
    assert ablate.main(["--config", path, "--only", "plain"], StubRunner()) == 0
    second = StubRunner()
    assert ablate.main(["--config", path], second) == 0
    assert [name.split("-")[0] for name in second.started] == ["soft", "soft"]
    assert "finished before" in capsys.readouterr().out
    third = StubRunner()
    assert ablate.main(["--config", path], third) == 0
    assert third.started == []


def test_interrupted_study_keeps_finished_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path)
    study = load_study(path)
    assert ablate.main(["--config", path], StubRunner(interrupt_at=2)) == 130
    assert "stopped by SIGTERM; finished runs are kept" in capsys.readouterr().err
    assert folders(study) == sorted([study.runs[0].name, f"{study.runs[1].name}.partial"])
    assert "| soft | 1 |" in (study.output_dir / "table.md").read_text()
    rest = StubRunner()
    assert ablate.main(["--config", path], rest) == 0
    assert len(rest.started) == 3
    assert folders(study) == sorted(run.name for run in study.runs)


def test_failed_arm_is_reported_and_the_others_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path)
    runner = StubRunner(fail="soft")
    assert ablate.main(["--config", path], runner) == 1
    assert len(runner.started) == 4
    error = capsys.readouterr().err
    assert error.count("failed: exit status 1") == 2
    assert "ValueError: the reason" in error
    assert "| soft | 0 | - | - | - |" in (tmp_path / "out" / "table.md").read_text()


def test_a_run_without_results_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate.main(["--config", write_study(tmp_path)], StubRunner(silent=True)) == 1
    assert "no results.json" in capsys.readouterr().err
    assert not (tmp_path / "out" / "accuracy.png").exists()


def test_leftovers_of_a_killed_run_are_replaced_and_foreign_folders_are_not(tmp_path: Path) -> None:
    first, second = load_study(write_study(tmp_path)).runs[:2]
    first.partial.mkdir(parents=True)
    (first.partial / "rubbish").write_text("x")
    execute(first, StubRunner())
    assert sorted(path.name for path in first.folder.iterdir()) == ["arguments.yaml", "log.txt", "results.json"]
    second.folder.mkdir()
    with pytest.raises(RuntimeError, match="holds no finished run: move it away"):
        execute(second, StubRunner())


def test_dry_run_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = StubRunner()
    assert ablate.main(["--config", write_study(tmp_path), "--dry_run"], runner) == 0
    assert runner.started == []
    assert not (tmp_path / "out").exists()
    out = capsys.readouterr().out
    assert out.count("(to run)") == 4
    assert "accelerate.commands.launch" in out


def test_unknown_arm_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate.main(["--config", write_study(tmp_path), "--only", "sfot"], StubRunner()) == 2
    assert "'sfot', the study has soft, plain" in capsys.readouterr().err


def test_child_output_goes_to_the_log_and_its_status_comes_back(tmp_path: Path) -> None:
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert run_process([sys.executable, "-c", script], tmp_path / "log.txt") == 3
    assert sorted((tmp_path / "log.txt").read_text().split()) == ["err", "out"]


def test_sigterm_ends_the_script_behind_the_launcher(tmp_path: Path) -> None:
    """A study killed in the middle of a run: the launcher and its child end, and the exit status says so."""
    grandchild = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    study = f"""
import sys
sys.path.insert(0, {str(Path(ablate.__file__).parent)!r})
import ablate
from harness.ablation import run_process
runner = lambda command, log: run_process([sys.executable, "-c", {launcher!r}], log)
sys.exit(ablate.main(["--config", {write_study(tmp_path)!r}], runner))
"""
    process = subprocess.Popen([sys.executable, "-c", study], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    process.terminate()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"stopped by SIGTERM" in error
    pid = (tmp_path / "pid").read_text()
    wait_until(lambda: not is_running(pid))
    assert folders(load_study(write_study(tmp_path)))[0].endswith(".partial")


def wait_until(holds: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip()
    return state != "" and not state.startswith("Z")


def test_a_study_of_another_script_and_metric(tmp_path: Path) -> None:
    base = {"model_name_or_path": "gpt2", "train_file": "a.txt", "validation_file": "b.txt"}
    study = load_study(
        write_study(tmp_path, base=base, script="language_model", metric="loss"), scripts=ablate.SCRIPTS
    )
    assert {Path(launch_command(run)[-3]).name for run in study.runs} == {"language_model.py"}
    for run in study.runs:
        execute(run, StubRunner())
    text = table(write_report(study), study.metric)
    assert "loss, noise off" in text
    assert text.count("1.0000") == 4  # two arms, two modes
    with pytest.raises(UsageError, match="they have accuracy, loss"):
        write_report(dataclasses.replace(study, metric="bleu"))


def test_settings_left_at_their_default_do_not_change_a_runs_name(tmp_path: Path) -> None:
    names = [run.name for run in load_study(write_study(tmp_path)).runs]
    explicit = {**STUDY["base"], "samples": None, "max_grad_norm": 1.0, "checkpointing_steps": 5}
    assert [run.name for run in load_study(write_study(tmp_path, base=explicit)).runs] == names
    other = {**STUDY["base"], "max_grad_norm": 2.0}
    assert not set(names) & {run.name for run in load_study(write_study(tmp_path, base=other)).runs}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"script": "quickstart"}, "expected one of finetune, language_model"), ({"metric": 3}, "expected the name of")],
)
def test_a_script_or_metric_that_is_none(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_study(write_study(tmp_path, **change), scripts=ablate.SCRIPTS)
