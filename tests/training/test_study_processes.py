"""Studies of real processes: killed runners, several runners in one folder, what they leave behind."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from studies import forked, rows_in, runner, status_of, use_fake_scripts, wait_until, write_study

from study import lease as leases
from study import process
from study.plan import load_study
from study.rows import TIMES

TWELVE = {
    "arms": {f"arm{i}": {"tau": 1.0 + i} for i in range(2, 8)},
    "seeds": [0, 1],
}


def lines(reports: Path, what: str) -> list[str]:
    path = reports / what
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def told(log: Path, words: str) -> bool:
    return log.exists() and words in log.read_text()


def comparable(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {key: value for key, value in row.items() if key not in TIMES} for name, row in rows.items()}


def test_a_study_whose_runner_is_killed_ten_times_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at random moments; the seed of the moments is fixed."""
    moments = random.Random(7)
    reports = use_fake_scripts(monkeypatch, tmp_path)
    plan = write_study(tmp_path, **TWELVE)
    argv = ["--config", plan, "--jobs", "2"]
    study = load_study(plan)
    kept: dict[str, bytes] = {}
    for _ in range(10):
        before = len(lines(reports, "starts"))
        with forked(runner(*argv), tmp_path / "log") as pid:
            wait_until(lambda before=before: len(lines(reports, "starts")) > before)
            time.sleep(moments.uniform(0.0, 0.2))
            os.kill(pid, signal.SIGKILL)
            assert status_of(pid) == -signal.SIGKILL, (tmp_path / "log").read_text()
        found = {path.name: path.read_bytes() for path in (tmp_path / "out" / "runs").glob("*.json")}
        assert kept.items() <= found.items(), "a finished run was lost or changed"
        kept = found
    assert len(kept) < len(study.runs), "every kill came before the end"
    with forked(runner(*argv), tmp_path / "log") as pid:
        assert status_of(pid) == 0, (tmp_path / "log").read_text()
    assert lines(reports, "collisions") == []
    assert lines(reports, "repeated") == []
    rows = rows_in(tmp_path / "out")
    assert sorted(rows) == sorted(run.id for run in study.runs)
    assert any(row["resumed_at_steps"] for row in rows.values()), "some went on from their checkpoint"
    assert len(lines(reports, "starts")) > len(rows)
    assert os.listdir(tmp_path / "out" / "work") == []

    with forked(runner(*argv, "--output_dir", str(tmp_path / "other")), tmp_path / "log") as pid:
        assert status_of(pid) == 0
    assert comparable(rows_in(tmp_path / "other")) == comparable(rows)


def test_two_runners_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = use_fake_scripts(monkeypatch, tmp_path)
    plan = write_study(tmp_path, **TWELVE)
    argv = ["--config", plan]
    with forked(runner(*argv), tmp_path / "log1") as first, forked(runner(*argv), tmp_path / "log2") as second:
        assert [status_of(first), status_of(second)] == [0, 0]
    assert Counter(lines(reports, "starts")) == Counter(run.id for run in load_study(plan).runs)
    assert lines(reports, "collisions") == []
    assert len(rows_in(tmp_path / "out")) == 12
    both = [(tmp_path / name).read_text().count(": running") for name in ("log1", "log2")]
    assert sum(both) == 12
    assert min(both) >= 1, "both worked"


def test_a_row_that_is_deleted_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = use_fake_scripts(monkeypatch, tmp_path, seconds=0.0)
    plan = write_study(tmp_path)
    with forked(runner("--config", plan), tmp_path / "log") as pid:
        assert status_of(pid) == 0
    rows = rows_in(tmp_path / "out")
    for name in rows:
        (tmp_path / "out" / "runs" / f"{name}.json").unlink()
        with forked(runner("--config", plan), tmp_path / "log") as pid:
            assert status_of(pid) == 0
        assert comparable(rows_in(tmp_path / "out")) == comparable(rows)
    assert Counter(lines(reports, "starts")) == dict.fromkeys(rows, 2)


def running(reports: Path) -> int:
    """The process of the last start."""
    return int((reports / "starts").read_text().splitlines()[-1].split()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_script_and_gives_the_run_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    reports = use_fake_scripts(monkeypatch, tmp_path, seconds=60.0)
    plan = write_study(tmp_path)
    with forked(runner("--config", plan), tmp_path / "log") as pid:
        wait_until(lambda: lines(reports, "starts"))
        script = running(reports)
        assert process.started_at(script) is not None
        os.kill(pid, number)
        assert status_of(pid) == 130
    assert process.started_at(script) is None
    assert f"stopped by {number.name}" in (tmp_path / "log").read_text()
    work = load_study(plan).runs[0].work
    assert json.loads((work / "claim-0").read_text())["released"] is True


def test_the_script_of_a_killed_runner_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = use_fake_scripts(monkeypatch, tmp_path, seconds=60.0)
    with forked(runner("--config", write_study(tmp_path)), tmp_path / "log") as pid:
        wait_until(lambda: lines(reports, "starts"))
        script = running(reports)
        os.kill(pid, signal.SIGKILL)
        status_of(pid)
        wait_until(lambda: process.started_at(script) is None, seconds=20.0)


def test_what_a_killed_runner_left_is_ended_before_another_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the supervisor cannot do it: it is stopped."""
    monkeypatch.setattr(process, "SECONDS_TO_END", 0.5)
    reports = use_fake_scripts(monkeypatch, tmp_path, seconds=60.0)
    plan = write_study(tmp_path)
    work = load_study(plan).runs[0].work
    with forked(runner("--config", plan), tmp_path / "log") as pid:
        wait_until(lambda: lines(reports, "starts"))
        supervisor = json.loads((work / "claim-0").read_text())["process"]
        os.kill(supervisor, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        status_of(pid)
    script = running(reports)
    assert process.started_at(script) is not None
    assert leases.take(work) is not None
    assert process.started_at(script) is None
    assert process.started_at(supervisor) is None


def test_a_run_of_another_machine_is_taken_over_when_its_claim_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = use_fake_scripts(monkeypatch, tmp_path, seconds=0.0)
    plan = write_study(tmp_path, arms={"soft": {"tau": 3.0}}, seeds=[0])
    work = load_study(plan).runs[0].work
    here = leases.machine
    monkeypatch.setattr(leases, "machine", lambda: "another machine")
    assert leases.take(work) is not None
    monkeypatch.setattr(leases, "machine", here)
    with forked(runner("--config", plan), tmp_path / "log") as pid:
        wait_until(lambda: told(tmp_path / "log", "claimed by other runners"))
        time.sleep(0.3)
        assert lines(reports, "starts") == []
        past = leases.clock(work) - leases.STALE_SECONDS - 1.0
        os.utime(work / "claim-0", (past, past))
        assert status_of(pid) == 0
    assert len(lines(reports, "starts")) == 1


def test_a_runner_that_was_taken_over_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = use_fake_scripts(monkeypatch, tmp_path, seconds=60.0)
    monkeypatch.setattr("study.execute.HEARTBEAT_SECONDS", 0.1)
    plan = write_study(tmp_path, arms={"soft": {"tau": 3.0}}, seeds=[0])
    work = load_study(plan).runs[0].work
    with forked(runner("--config", plan), tmp_path / "log") as pid:
        wait_until(lambda: lines(reports, "starts"))
        script = running(reports)
        (work / "claim-1").write_text("{}")  # another took over
        wait_until(lambda: process.started_at(script) is None, seconds=20.0)
        wait_until(lambda: told(tmp_path / "log", "claimed by other runners"))
        os.kill(pid, signal.SIGTERM)
        assert status_of(pid) == 130
    assert told(tmp_path / "log", "another runner has taken over")
    assert len(lines(reports, "starts")) == 1
    assert rows_in(tmp_path / "out") == {}
