"""What trackers and the progress bar are told: the series of results.json, each step once, by the first process."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from interrupted import HARD_TO_RESUME, at_batch, outcome, start, stop_at_batch, words
from recorder import RATES, Recorder, recorded, series_of, without_rates
from test_nonfinite import FetchCounter
from tiny import sentences, write_rows
from tqdm import tqdm

import finetune
from forked import run_in_two
from gumbel_attention.diagnostics import MEASURES
from harness.arguments import TRACKERS
from harness.errors import UsageError
from harness.loop import TrainingLoop
from harness.tracking import installed_trackers

LAYERS = [f"bert.encoder.layer.{number}.attention.self" for number in (0, 1)]


@pytest.fixture
def trackers() -> Iterator[list[Recorder]]:
    with recorded() as runs:
        yield runs


@pytest.fixture
def hard(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | HARD_TO_RESUME | {"logging_steps": 1}


def stripped(found: dict[str, Any]) -> dict[str, Any]:
    """An outcome without the measures of the attention."""
    train = [{k: v for k, v in entry.items() if not k.startswith("attention")} for entry in found["series"]["train"]]
    return found | {"series": found["series"] | {"train": train}}


@pytest.mark.parametrize("measures", ["none", "mean", "layers"])
def test_a_tracker_is_told_exactly_the_series(
    settings: dict[str, Any], tmp_path: Path, trackers: list[Recorder], measures: str
) -> None:
    start(settings, report_to="wandb", attention_metrics=measures, hard=True, eval_steps=2, project_name="study")
    (run,) = trackers
    expected = series_of(tmp_path / "run")
    assert len(expected) == 6 + 3 * 2
    assert without_rates(run.told) == expected
    named = {key for _, values in run.told for key in values if key.startswith("attention/")}
    per_layer = {f"attention/{layer}/{measure}" for layer in LAYERS for measure in MEASURES}
    means = {f"attention/{measure}" for measure in MEASURES}
    assert named == {"none": set(), "mean": means, "layers": means | per_layer}[measures]
    rates = [values[name] for _, values in run.told for name in RATES if "train/loss" in values]
    assert len(rates) == 12
    assert min(rates) > 0
    assert run.calls == ["start", "finish"]
    assert run.project == "study"
    assert run.options | {"id": ""} == {"id": "", "name": "run", "resume": "allow", "dir": str(tmp_path / "run")}
    assert run.config is not None
    assert run.config["learning_rate"] == 1e-3
    assert run.config["tau_end"] == "null"


def test_an_unpatched_model_has_no_measures_and_no_temperature(
    settings: dict[str, Any], tmp_path: Path, trackers: list[Recorder]
) -> None:
    start(settings, report_to="wandb", attention_metrics="layers", attention="unpatched")
    assert without_rates(trackers[0].told) == series_of(tmp_path / "run")
    assert not any("attention" in key or "tau" in key for _, values in trackers[0].told for key in values)


def test_trackers_and_measures_change_no_bit(
    hard: dict[str, Any], tmp_path: Path, trackers: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(hard, output_dir=str(tmp_path / "plain"))
    expected = outcome(tmp_path / "plain")
    told = {"report_to": "wandb", "attention_metrics": "layers"}
    start(hard, **told)
    assert stripped(outcome(tmp_path / "run")) == expected
    assert all("attention_layers" in entry for entry in outcome(tmp_path / "run")["series"]["train"])
    stop_at_batch(5, hard, monkeypatch, **told, output_dir=str(tmp_path / "resumed"))
    start(hard, **told, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint="latest")
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "run")


def test_a_run_that_is_stopped_goes_on_under_its_name_and_tells_each_step_once(
    hard: dict[str, Any], tmp_path: Path, trackers: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_batch(5, hard, monkeypatch, report_to="wandb", attention_metrics="mean")
    start(hard, report_to="wandb", attention_metrics="mean", resume_from_checkpoint="latest")
    first, second = trackers
    assert first.told
    assert second.told
    assert without_rates(first.told + second.told) == series_of(tmp_path / "run")
    assert first.options == second.options
    assert first.calls == second.calls == ["start", "finish"]
    assert first.config is not None
    assert second.config is None


def test_a_run_that_is_killed_tells_what_it_lost_a_second_time_alike(
    hard: dict[str, Any], tmp_path: Path, trackers: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after_step_3(hard, monkeypatch, report_to="wandb", attention_metrics="mean")
    start(hard, report_to="wandb", attention_metrics="mean", resume_from_checkpoint="latest")
    first, second = (without_rates(run.told) for run in trackers)
    assert [step for step, _ in first] == [1, 2, 2, 2, 3]
    assert [step for step, _ in second][:2] == [3, 4]
    assert first[:-1] + second == series_of(tmp_path / "run")
    assert first[-1] == second[0]


def kill_after_step_3(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A run that ends in its fourth step at once; its last checkpoint is of the second."""

    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    with monkeypatch.context() as patched:
        at_batch(6, die, patched)  # an epoch has three steps of two, two and one batches
        with pytest.raises(Killed):
            start(settings, checkpointing_steps=2, **changes)


def test_trackers_and_measures_may_change_when_a_run_goes_on(
    hard: dict[str, Any], tmp_path: Path, trackers: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_batch(5, hard, monkeypatch)
    start(hard, report_to="wandb", attention_metrics="mean", project_name="other", resume_from_checkpoint="latest")
    (run,) = trackers
    assert {step for step, _ in run.told} == {4, 5, 6}
    assert run.config is not None, "no tracker knew the run before"
    train = outcome(tmp_path / "run")["series"]["train"]
    assert ["attention" in entry for entry in train] == [False, False, False, True, True, True]


def test_a_run_in_another_folder_has_another_name(
    hard: dict[str, Any], tmp_path: Path, trackers: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_batch(5, hard, monkeypatch, report_to="wandb")
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    start(hard, report_to="wandb", output_dir=str(tmp_path / "fork"), resume_from_checkpoint=str(checkpoint))
    assert trackers[0].options["id"] != trackers[1].options["id"]


@pytest.mark.parametrize(
    ("wanted", "installed", "message"),
    [
        ("wandb", (), "error: report_to=wandb needs what is not installed: pip install wandb, or report_to=none."),
        ("tensorboard, trackio", ("wandb",), "pip install tensorboard trackio, or report_to=none."),
        ("all", (), "error: report_to=all, but none of tensorboard, wandb, trackio is installed: pip install one"),
        (
            "mlflow",
            (),
            "report_to must be none, all, or some of tensorboard, wandb, trackio with commas, got 'mlflow'",
        ),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_at_once(
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wanted: str,
    installed: tuple[str, ...],
    message: str,
) -> None:
    with recorded(installed), pytest.raises(SystemExit) as stopped:
        finetune.main(words(settings | {"train_file": "missing.tsv", "report_to": wanted}))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_which_trackers_a_setting_names() -> None:
    with recorded(("trackio", "tensorboard")):
        assert installed_trackers("none") == []
        assert installed_trackers("all") == ["tensorboard", "trackio"]
        assert installed_trackers("trackio,tensorboard, trackio") == ["trackio", "tensorboard"]
    with recorded(TRACKERS):
        assert installed_trackers("all") == list(TRACKERS)


def test_a_tracker_that_does_not_start_is_said_and_one_that_did_is_told_the_end_of_a_failed_run(
    settings: dict[str, Any], trackers: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(finetune.Classification, "evaluate", mock.Mock(side_effect=ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            start(settings, report_to="wandb", output_dir=settings["output_dir"] + "-failed")
    assert trackers[0].calls == ["start", "finish"]
    monkeypatch.setattr(Recorder, "start", mock.Mock(side_effect=RuntimeError("no API key")))
    with pytest.raises(UsageError, match="report_to=wandb: the trackers do not start: RuntimeError: no API key"):
        start(settings, report_to="wandb")


def test_nothing_is_fetched_from_the_device_between_entries(
    settings: dict[str, Any], trackers: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, by_step, finish = FetchCounter(), [], TrainingLoop._finish_step

    def finishing(self: Any) -> None:
        finish(self)
        by_step.append(sorted(set(counter.fetches)))
        counter.fetches.clear()

    monkeypatch.setattr(TrainingLoop, "_finish_step", finishing)
    with counter:
        start(settings, logging_steps=3, eval_steps=100, report_to="wandb", attention_metrics="layers")
    assert by_step[:5] == [[], [], ["_log", "check"], [], []]


def test_the_bar_shows_loss_temperature_and_speed(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()

    class Bar(tqdm):  # type: ignore[type-arg]  # not generic when it runs
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, file=screen, mininterval=0)

    monkeypatch.setattr("harness.loop.tqdm", Bar)
    record = start(settings, logging_steps=3, tau_schedule="linear", tau_end=0.4)
    told = [line for line in screen.getvalue().replace("\n", "\r").split("\r") if "loss " in line]
    assert any("3/6 [" in line and f"loss {record.train[0]['loss']:.4f}, tau 0.8, " in line for line in told)
    assert f"loss {record.train[1]['loss']:.4f}, tau 0.5, " in told[-1]
    assert "6/6 [" in told[-1]
    assert all(re.search(r", [1-9]\d* tokens/s", line) for line in told)


def test_tensorboard_shows_each_step_once(
    hard: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = {"report_to": "tensorboard", "attention_metrics": "layers"}
    kill_after_step_3(hard, monkeypatch, **told)
    start(hard, **told, resume_from_checkpoint="latest")
    folder = tmp_path / "run" / "tensorboard" / "gumbel_attention"
    assert len(list(folder.glob("events.*"))) == 2
    events = EventAccumulator(str(folder)).Reload()
    shown = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    expected: dict[str, list[tuple[int, Any]]] = {}
    for step, values in series_of(tmp_path / "run"):
        for name, value in values.items():
            expected.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert {name: points for name, points in shown.items() if name not in RATES} == expected
    start(hard, **told, overwrite_output_dir=True, max_train_steps=1)
    assert len(list(folder.glob("events.*"))) == 1, "the run that was overwritten is gone"


@pytest.mark.slow
def test_of_two_processes_the_first_tells_and_counts_for_both(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of 20 examples the second has four, four and none."""
    settings["train_file"] = write_rows(tmp_path / "train.tsv", sentences(20))
    alone = start(settings, output_dir=str(tmp_path / "one"))
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"per_device_train_batch_size": 4}))
    run_in_two(_one_of_two, tmp_path, log=tmp_path / "log")
    first, second = (json.loads((tmp_path / f"process_{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["told"]) == 1
    assert [tuple(each) for each in without_rates(first["told"][0])] == series_of(tmp_path / "run")
    assert second["told"] == []
    assert first["train"] == second["train"], "the measures are those of both"
    assert first["tokens"] == second["tokens"] == alone.tokens


def _one_of_two(folder: Path) -> None:
    """What each process of the test above does."""
    settings = json.loads((folder / "settings.json").read_text())
    rank = int(os.environ["RANK"])
    with recorded() as runs:
        record = start(settings, report_to="wandb", attention_metrics="layers")
    found = {"told": [run.told for run in runs], "train": record.train, "tokens": record.tokens}
    (folder / f"process_{rank}.json").write_text(json.dumps(found))
