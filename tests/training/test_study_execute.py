"""The loop around a study's processes, with scripts that end at once."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import StubProcess, StubStarter, rows_in, write_study

from harness.results import write_results
from study import lease as leases
from study.execute import Interrupted, Options, run_all
from study.plan import PlannedRun, Study, load_study
from study.process import SupervisedProcess, launch_command, portable_command, threads_per_run
from study.progress import Progress, duration
from study.rows import write_durably


def run(study: Study, starter: Any, **options: Any) -> tuple[dict[str, str], list[str]]:
    """Failures and what was told."""
    told: list[str] = []
    how = Options(start=starter, tell=told.append, **options)
    return run_all(study.runs, study.title, Progress(study.runs), how), told


def test_finished_runs_become_rows_and_their_folders_go(tmp_path: Path) -> None:
    study, starter = load_study(write_study(tmp_path, title="Noise")), StubStarter()
    failures, told = run(study, starter)
    assert failures == {}
    assert starter.started == [run.id for run in study.runs]
    rows = rows_in(tmp_path / "out")
    assert sorted(rows) == sorted(starter.started)
    row = rows[study.runs[0].id]
    assert {key: row[key] for key in ("study", "arm", "seed", "script", "status")} == {
        "study": "Noise",
        "arm": "soft",
        "seed": 0,
        "script": "finetune",
        "status": "finished",
    }
    assert row["command"].startswith("accelerate launch --num_processes 1")
    assert row["command"].endswith(f"training/finetune.py --config work/{study.runs[0].id}/arguments.yaml")
    assert str(tmp_path) not in json.dumps(row), "no folder of this machine"
    assert row["config"]["seed"] == 0
    assert row["config"]["tau"] == 2.0
    assert not {"output_dir", "resume_from_checkpoint", "overwrite_output_dir"} & set(row["config"])
    assert row["wall_seconds"] >= 0
    assert os.listdir(tmp_path / "out" / "work") == []
    assert told[-1].startswith("[4/4] plain seed 1: done in ")
    assert "[1/4] soft seed 0: done in 0 s; about " in "\n".join(told)


def test_nothing_that_is_finished_is_run_again(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    run(study, StubStarter())
    second = StubStarter()
    assert run(study, second) == ({}, [])
    assert second.started == []
    study.runs[1].row.write_text('{"id": "half')
    run(study, second)
    assert second.started == [study.runs[1].id]


def test_a_failed_run_is_recorded_and_the_others_run(tmp_path: Path) -> None:
    study, starter = load_study(write_study(tmp_path)), StubStarter(fail="soft")
    failures, told = run(study, starter)
    assert set(failures) == {study.runs[0].id, study.runs[1].id}
    assert len(starter.started) == 4
    content = json.loads(study.runs[0].failure.read_text())
    assert (content["arm"], content["seed"], content["exit_status"]) == ("soft", 0, 1)
    assert content["log"] == ["starting", "ValueError: the reason"]
    assert failures[study.runs[0].id].endswith("ValueError: the reason")
    assert any("soft seed 0: FAILED: exit status 1" in line for line in told)
    assert run(study, StubStarter())[0] == {}
    assert not study.runs[0].failure.exists()
    assert len(rows_in(tmp_path / "out")) == 4


def test_a_run_without_results_has_failed(tmp_path: Path) -> None:
    failures, _ = run(load_study(write_study(tmp_path)), StubStarter(silent=True))
    assert len(failures) == 4
    assert all("no results.json" in message for message in failures.values())


def test_a_run_that_cannot_start_has_failed(tmp_path: Path) -> None:
    def starter(*_: Any) -> StubProcess:
        raise OSError("no more processes")

    failures, _ = run(load_study(write_study(tmp_path)), starter)
    assert len(failures) == 4
    assert all("could not be started: no more processes" in message for message in failures.values())


def test_a_run_that_failed_elsewhere_meanwhile_is_not_tried_again(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, seeds=[0]))

    class Elsewhere(StubStarter):
        def __call__(self, *given: Any) -> StubProcess:
            write_durably(study.runs[1].failure, json.dumps({"message": "out of memory"}))
            return super().__call__(*given)

    starter = Elsewhere()
    failures, _ = run(study, starter)
    assert starter.started == [study.runs[0].id]
    assert failures == {study.runs[1].id: "elsewhere: out of memory"}
    again = StubStarter()
    assert run(study, again)[0] == {}, "a new runner tries again"
    assert again.started == [study.runs[1].id]


def prepared(run: PlannedRun) -> None:
    """A folder as a killed runner leaves it after its script has ended."""
    run.work.mkdir(parents=True)
    settings = {**run.args.to_dict(), "output_dir": str(run.work), "resume_from_checkpoint": "latest"}
    (run.work / "arguments.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False))
    write_results(run.work, {"final": {}, "config": settings, "versions": {}, "device": "cpu"})


def test_results_that_were_not_collected_are(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    prepared(study.runs[0])
    prepared(study.runs[1])
    (study.runs[1].work / "arguments.yaml").write_text("tau: 7.0\n")  # of other settings
    starter = StubStarter()
    run(study, starter)
    assert starter.started == [run.id for run in study.runs[1:]]
    assert rows_in(tmp_path / "out")[study.runs[0].id]["wall_seconds"] is None


def test_what_is_left_without_a_checkpoint_is_removed_and_with_one_it_stays(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    for planned in study.runs[:2]:
        (planned.work / "folder").mkdir(parents=True)
        (planned.work / "rubbish").write_text("x")
    (study.runs[1].work / "checkpoint-3").mkdir()
    run(study, StubStarter(), keep_work=True)
    first, second = (sorted(os.listdir(planned.work)) for planned in study.runs[:2])
    assert first == ["arguments.yaml", "claim-0", "log.txt", "results.json"]
    assert {"checkpoint-3", "rubbish", "folder"} < set(second)


def test_a_row_that_was_removed_is_run_again_though_its_folder_was_kept(tmp_path: Path) -> None:
    """But not where the row was never written: what is finished is not repeated."""
    study = load_study(write_study(tmp_path))
    run(study, StubStarter(), keep_work=True)
    study.runs[3].row.unlink()
    again = StubStarter(value=lambda settings: 0.9)
    assert run(study, again, keep_work=True)[0] == {}
    assert again.started == [study.runs[3].id]
    assert rows_in(tmp_path / "out")[study.runs[3].id]["final"]["noise_off"]["accuracy"] == 0.9
    claim = sorted(study.runs[3].work.glob("claim-*"))[-1]
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "finished": False}))
    study.runs[3].row.unlink()
    third = StubStarter()
    run(study, third, keep_work=True)
    assert third.started == []


def test_leftovers_of_a_removal_go(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    (tmp_path / "out" / "work" / ".removed-0123" / "folder").mkdir(parents=True)
    run(study, StubStarter())
    assert os.listdir(tmp_path / "out" / "work") == []


def test_the_folder_of_a_finished_run_goes_though_its_runner_died_before_and_one_that_was_kept_stays(
    tmp_path: Path,
) -> None:
    study = load_study(write_study(tmp_path))
    run(study, StubStarter(), keep_work=True)
    died, *kept = study.runs
    claim = died.work / "claim-0"
    content = json.loads(claim.read_text())
    assert content.pop("released")
    content["began"] -= 100.0  # a process that is no more,
    content["process_began"] -= 100.0  # as is the one it had begun: nothing to wait for
    claim.write_text(json.dumps(content))
    again = StubStarter()
    run(study, again, keep_work=True)
    assert died.work.exists()
    run(study, again)
    assert again.started == []
    assert sorted(os.listdir(tmp_path / "out" / "work")) == sorted(planned.id for planned in kept)


@dataclasses.dataclass
class Slow:
    """Counts how many processes are at work at once; each ends at the third look."""

    together: int = 0
    most: int = 0
    stopped: int = 0

    def __call__(self, command: Any, log: Path) -> Any:
        return _SlowProcess(self, StubStarter()(command, log))


class _SlowProcess:
    def __init__(self, slow: Slow, process: StubProcess) -> None:
        self._slow, self._process, self._looks, self.pid = slow, process, 0, process.pid

    def begin(self) -> None:
        self._slow.together += 1
        self._slow.most = max(self._slow.most, self._slow.together)
        self._process.begin()

    def poll(self) -> int | None:
        self._looks += 1
        if self._looks < 3:
            return None
        self._slow.together -= 1
        return self._process.poll()

    def stop(self) -> None:
        self._slow.stopped += 1

    def join(self) -> None:
        pass


@pytest.mark.parametrize("jobs", [1, 3])
def test_so_many_run_at_a_time(tmp_path: Path, jobs: int) -> None:
    slow = Slow()
    assert run(load_study(write_study(tmp_path)), slow, jobs=jobs)[0] == {}
    assert slow.most == jobs
    assert len(rows_in(tmp_path / "out")) == 4


def test_a_reason_to_stop_ends_what_runs_and_gives_it_up(tmp_path: Path) -> None:
    study, slow = load_study(write_study(tmp_path)), Slow()
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        run(study, slow, jobs=2, stopped=lambda: "stopped by SIGTERM" if slow.together == 2 else None)
    assert slow.stopped == 2
    assert leases.take(study.runs[0].work) is not None
    assert rows_in(tmp_path / "out") == {}


def test_the_time_left_is_that_of_the_arm_or_else_of_all(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    assert Progress(study.runs).seconds_left(1) is None
    run(dataclasses.replace(study, runs=study.runs[:1]), StubStarter())
    content = json.loads(study.runs[0].row.read_text())
    now = [100.0]
    progresses = []
    for seconds in (None, 50.0):
        study.runs[0].row.write_text(json.dumps({**content, "wall_seconds": seconds}))
        progresses.append(Progress(study.runs, lambda: now[0]))
    assert [progress.seconds_left(1) for progress in progresses] == [9.0, 150.0]
    progress = progresses[1]
    assert (progress.finished, progress.total, progress.count()) == (1, 4, "[1/4]")
    assert (progress.seconds_left(3), progress.left(1)) == (50.0, "; about 2 min left")
    progress.note_begun(study.runs[1])
    now[0] += 30.0
    assert progress.seconds_left(1) == 120.0
    progress.note_failed(study.runs[1])
    assert progress.seconds_left(1) == 100.0
    assert [duration(seconds) for seconds in (63.4, 1860, 9000)] == ["63 s", "31 min", "2.5 h"]


def test_command_goes_through_accelerate_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"train_file": "a", "validation_file": "b"}
    planned = load_study(write_study(tmp_path, script="transduction", base=base, metric="loss")).runs[0]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = launch_command(planned, 3)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[command.index("--num_processes") + 1] == "1"
    assert command[command.index("--mixed_precision") + 1] == "no"
    assert command[command.index("--num_cpu_threads_per_process") + 1] == "3"
    assert Path(command[-3]).name == "transduction.py"
    assert Path(command[-3]).exists()
    assert "--cpu" in command
    assert not any(os.path.isabs(word) for word in portable_command(planned, 3))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "--cpu" not in launch_command(planned, 3)


def test_runs_share_the_processor_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [threads_per_run(jobs) for jobs in (1, 3, 20)] == [8, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads_per_run(3) == 5


def test_output_goes_to_the_log_and_the_status_comes_back(tmp_path: Path) -> None:
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    process = SupervisedProcess([sys.executable, "-I", "-S", "-c", script], tmp_path / "log.txt")
    assert process.poll() is None
    process.begin()
    process._popen.wait(timeout=60)
    assert process.poll() == 3
    assert sorted((tmp_path / "log.txt").read_text().split()) == ["err", "out"]


def test_a_command_that_nobody_begins_is_never_run(tmp_path: Path) -> None:
    process = SupervisedProcess([sys.executable, "-I", "-S", "-c", "print('ran')"], tmp_path / "log.txt")
    process.join()
    assert process.poll() == 143
    assert (tmp_path / "log.txt").read_text() == ""
