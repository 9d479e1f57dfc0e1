"""The search before a study: what it runs, what it chooses, what it must not look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from studies import STUDY, StubStarter, rows_in, write_study

import ablate
from harness.errors import UsageError
from study.folder import read_study
from study.plan import load_study
from study.rows import read_rows

SEARCH: dict[str, Any] = {
    "grid": {"learning_rate": [2e-4, "5e-5", 1e-4]},
    "seeds": [100, 101],
    "settings": {"validation_file": "held_out.tsv"},
}


def peak(at: float, other: float | None = None) -> Any:
    """An accuracy with its highest value at one learning rate; ``other`` has the same."""
    return lambda settings: 0.9 if settings["learning_rate"] in (at, other) else 0.5 + settings["seed"] / 1000


def test_every_arm_searches_the_same_grid_on_other_data(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, search=SEARCH))
    assert study.search is not None
    assert study.search.grid == {"learning_rate": (5e-5, 1e-4, 2e-4)}
    assert len(study.search.runs) == 2 * 3 * 2
    assert {run.args.validation_file for run in study.search.runs} == {"held_out.tsv"}  # type: ignore[attr-defined]  # scripts differ in it
    assert {run.args.seed for run in study.search.runs} == {100, 101}
    assert {run.row.parent.name for run in study.search.runs} == {"search"}
    assert study.search.runs[0].label == "search: soft seed 100, learning_rate 5e-05"
    plain = load_study(write_study(tmp_path))
    assert [run.id for run in study.runs] == [run.id for run in plain.runs]


def test_a_setting_that_is_on_or_off_is_searched_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"learning_rate": [1e-4, 2e-4], "disable_dropout": [True, False]}
    path = write_study(tmp_path, search=SEARCH | {"grid": grid})
    starter = StubStarter(value=lambda s: 0.5 + 0.1 * (s["disable_dropout"] == (s["noise"] == "none")))
    assert ablate.main(["--config", path], starter) == 0
    chosen = {
        row.arm: (row.config["learning_rate"], row.config["disable_dropout"]) for row in read_rows(tmp_path / "out")
    }
    assert chosen == {"soft": (1e-4, False), "plain": (1e-4, True)}
    assert read_study(tmp_path / "out").chosen["plain"] == {"learning_rate": 1e-4, "disable_dropout": True}
    assert "plain takes learning_rate 0.0001, disable_dropout true" in capsys.readouterr().out


def test_what_is_best_on_average_enters_the_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path, search=SEARCH)
    starter = StubStarter(value=lambda s: peak(2e-4 if s["noise"] == "none" else 1e-4)(s))
    assert ablate.main(["--config", path], starter) == 0
    assert len(starter.started) == 12 + 4
    chosen = {row.arm: row.config["learning_rate"] for row in read_rows(tmp_path / "out")}
    assert chosen == {"soft": 1e-4, "plain": 2e-4}
    assert {row["config"]["validation_file"] for row in rows_in(tmp_path / "out").values()} == {"b.tsv"}
    content = json.loads((tmp_path / "out" / "search" / "chosen.json").read_text())
    assert content["arms"]["plain"]["chosen"] == {"learning_rate": 2e-4}
    assert [item["mean"] for item in content["arms"]["plain"]["means"]] == pytest.approx([0.6005, 0.6005, 0.9])
    assert "search: plain takes learning_rate 0.0002" in capsys.readouterr().out
    assert read_study(tmp_path / "out").chosen["soft"] == {"learning_rate": 1e-4}
    assert [row.id for row in read_rows(tmp_path / "out")] == [run.id for run in read_study(tmp_path / "out").runs]
    assert len(read_rows(tmp_path / "out", rows_folder="search")) == 12
    again = StubStarter()
    assert ablate.main(["--config", path], again) == 0
    assert again.started == []


def test_the_smaller_of_equal_values_is_taken_and_lower_may_be_better(tmp_path: Path) -> None:
    path = write_study(tmp_path, search=SEARCH)
    assert ablate.main(["--config", path], StubStarter(value=peak(1e-4, 2e-4))) == 0
    assert {row.config["learning_rate"] for row in read_rows(tmp_path / "out")} == {1e-4}
    path = write_study(tmp_path, search=SEARCH, metric="loss", output_dir=str(tmp_path / "loss"))
    assert ablate.main(["--config", path], StubStarter()) == 0  # all losses are equal
    assert {row.config["learning_rate"] for row in read_rows(tmp_path / "loss")} == {5e-5}


def test_a_value_that_fails_is_not_chosen_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path, search=SEARCH)
    diverges = StubStarter(value=peak(2e-4), fails=lambda settings: settings["learning_rate"] == 2e-4)
    assert ablate.main(["--config", path], diverges) == 1
    assert {row.config["learning_rate"] for row in read_rows(tmp_path / "out")} == {5e-5}
    assert "learning_rate 0.0002: none" in capsys.readouterr().out
    assert ablate.main(["--config", path, "--only", "plain", "--seeds", "0"], diverges) == 1
    assert len(read_rows(tmp_path / "out")) == 4, "what was chosen for the other arm stays"
    nothing = write_study(tmp_path, search=SEARCH, output_dir=str(tmp_path / "none"))
    assert ablate.main(["--config", nothing], StubStarter(fail="soft")) == 1
    assert {row.arm for row in read_rows(tmp_path / "none")} == {"plain"}
    assert "run search of soft failed: no value of the grid has finished" in capsys.readouterr().err


def test_one_arm_alone_and_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path, search=SEARCH)
    assert ablate.main(["--config", path, "--only", "soft", "--seeds", "1"], StubStarter(value=peak(1e-4))) == 0
    assert [(row.arm, row.seed) for row in read_rows(tmp_path / "out")] == [("soft", 1)]
    capsys.readouterr()
    assert ablate.main(["--config", path, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "16 runs, 7 finished, 9 to do" in out
    assert out.count("learning_rate is chosen first") == 2
    assert "(to run)\n" in out


def test_a_runner_of_other_arms_keeps_what_was_chosen_meanwhile(tmp_path: Path) -> None:
    """While one runner is in the search of one arm, another one finishes the other arm, search and all."""
    path = write_study(tmp_path, search=SEARCH)
    inner = ["--config", path, "--only", "plain"]
    calls = []

    def value(settings: dict[str, Any]) -> float:
        if settings["noise"] == "gumbel" and not calls:
            calls.append(ablate.main(inner, StubStarter(value=peak(2e-4))))
        return float(peak(1e-4)(settings))

    assert ablate.main(["--config", path, "--only", "soft"], StubStarter(value=value)) == 0
    assert calls == [0]
    rates = {row.arm: row.config["learning_rate"] for row in read_rows(tmp_path / "out")}
    assert rates == {"soft": 1e-4, "plain": 2e-4}
    assert read_study(tmp_path / "out").unsettled == []


def test_some_arms_may_keep_what_the_base_says(tmp_path: Path) -> None:
    path = write_study(tmp_path, search={**SEARCH, "arms": ["plain"]})
    study = load_study(path)
    assert study.search is not None
    assert {run.arm for run in study.search.runs} == {"plain"}
    assert study.unsettled == ["plain"]
    starter = StubStarter(value=peak(2e-4))
    assert ablate.main(["--config", path], starter) == 0
    assert len(starter.started) == 6 + 4
    rates = {row.arm: row.config["learning_rate"] for row in read_rows(tmp_path / "out")}
    assert rates == {"soft": study.runs[0].args.learning_rate, "plain": 2e-4}
    again = read_study(tmp_path / "out")
    assert again.search is not None
    assert list(again.search.arms) == ["plain"]
    assert again.unsettled == []


THREE = {**STUDY["arms"], "hard": {"noise": "none", "hard": True}}


def test_an_arm_may_take_what_another_ones_search_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path, arms=THREE, search={**SEARCH, "arms": ["plain"], "follow": {"hard": "plain"}})
    assert load_study(path).unsettled == ["plain", "hard"]
    assert ablate.main(["--config", path, "--only", "hard", "--seeds", "0"], StubStarter(value=peak(2e-4))) == 0
    assert [(row.arm, row.config["learning_rate"]) for row in read_rows(tmp_path / "out")] == [("hard", 2e-4)]
    starter = StubStarter(value=peak(2e-4))
    assert ablate.main(["--config", path], starter) == 0
    assert len(starter.started) == 5, "the search is not repeated"
    base = load_study(path).runs[0].args.learning_rate
    rates = {row.arm: row.config["learning_rate"] for row in read_rows(tmp_path / "out")}
    assert rates == {"soft": base, "plain": 2e-4, "hard": 2e-4}
    again = read_study(tmp_path / "out")
    assert again.search is not None
    assert (again.search.follow, again.unsettled) == ({"hard": "plain"}, [])
    assert again.chosen["hard"] == {"learning_rate": 2e-4}


def test_the_search_of_an_arm_may_differ_in_more_than_the_grid(tmp_path: Path) -> None:
    """A budget, say: each arm's own in the study, and in the search a part of it."""
    arms = {"plain": {"max_train_steps": 5}, "soft": {}}
    search = {**SEARCH, "arms": arms, "settings": {**SEARCH["settings"], "max_train_steps": 9}}
    study = load_study(write_study(tmp_path, search=search))
    assert study.search is not None
    steps = {run.arm: run.args.max_train_steps for run in study.search.runs}
    assert steps == {"soft": 9, "plain": 5}
    assert {run.args.max_train_steps for run in study.runs} == {None}
    assert ablate.main(["--config", str(tmp_path / "plan.yaml")], StubStarter(value=peak(2e-4))) == 0
    again = read_study(tmp_path / "out")
    assert again.search is not None
    assert again.search.arms == {"soft": {}, "plain": {"max_train_steps": 5}}
    assert [run.id for run in again.search.runs] == [run.id for run in study.search.runs]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"follow": {"hard": "plain"}},
            "expected arms that are not searched, each with one that is .*got hard: plain",
        ),
        ({"arms": ["plain"], "follow": {"plain": "plain"}}, "got plain: plain"),
        ({"arms": ["plain"], "follow": {"hard": "soft"}}, r"\(plain\), got hard: soft"),
        ({"arms": ["plain"], "follow": {"hrad": "plain"}}, "got hrad: plain"),
        ({"arms": ["plain"], "follow": ["hard"]}, "follow in search of .*: expected a mapping"),
        ({"arms": {"plain": {"learning_rate": 1.0}}}, "arm 'plain' sets learning_rate, which the search"),
        ({"arms": {"plain": {"seed": 1}}}, "seed is set by the study"),
        ({"arms": {"plain": {"max_train_step": 1}}}, r"mean max_train_steps\?"),
        ({"arms": "plain"}, "expected some of soft, plain, hard"),
    ],
)
def test_followers_and_searched_arms_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_study(write_study(tmp_path, arms=THREE, search={**SEARCH, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["plain", "sotf"]}, r"arms in search of .* expected some of soft, plain, none twice"),
        ({"arms": []}, "arms in search of"),
        ({"arms": ["plain", "plain"]}, "none twice"),
        ({"seeds": [1, 100]}, r"seeds in search of .*: \[1\] are seeds of the study too"),
        ({"settings": {}}, "evaluated on the study's own evaluation data"),
        ({"settings": {"validation_file": "./x/../b.tsv"}}, "evaluated on the study's own evaluation data"),
        ({"settings": {"max_eval_samples": 10}}, "evaluated on the study's own evaluation data"),
        ({"settings": {"validation_file": "a.tsv"}}, "evaluated on what it is trained on"),
        ({"settings": {"validation_file": "c.tsv", "train_file": "b.tsv"}}, "trained on the study's evaluation data"),
        ({"settings": {"learning_rate": 1.0}}, "set learning_rate, which its grid varies"),
        ({"settings": {"seed": 1}}, "seed is set by the study"),
        ({"grid": {}}, "expected values such as"),
        ({"grid": {"learning_rate": [1e-4]}}, "two values or more"),
        ({"grid": {"learning_rate": [1e-4, "1e-4"]}}, "holds a value twice"),
        ({"grid": {"learning_rtae": [1e-4, 2e-4]}}, r"mean learning_rate\?"),
        ({"grid": {"learning_rate": [1e-4, -1.0]}}, "learning_rate must be > 0"),
        ({"grid": {"train_file": ["a.tsv", "c.tsv"]}}, "expected numbers, or false and true"),
        ({"grid": {"tau": [1.0, 3.0]}}, "arm 'soft' sets tau"),
        ({"mode": "mean_4"}, "is evaluated in noise_off, noise_on, got 'mean_4'"),
        ({"seed": [3]}, r"mean seeds\?"),
    ],
)
def test_searches_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arms = {"soft": {"tau": 5.0}, "plain": {"noise": "none"}}
    with pytest.raises(UsageError, match=message):
        load_study(write_study(tmp_path, arms=arms, search={**SEARCH, **changes}))


HUB = {"dataset_name": "d", "train_split": "train[:90%]", "validation_split": "validation"}
TEXT = {"model_name_or_path": "gpt2", "train_file": "a.txt", "validation_split_percentage": 10}
FILES = {"model_name_or_path": "gpt2", "train_file": "a.txt", "validation_file": "b.txt"}


@pytest.mark.parametrize(
    ("script", "base", "settings", "message"),
    [
        ("finetune", HUB, {"validation_split": "train[90%:]"}, None),
        ("finetune", HUB, {"validation_split": "validation[:50%]"}, "own evaluation data"),
        ("finetune", HUB, {"train_split": "train", "validation_split": "train[90%:]"}, "what it is trained on"),
        ("finetune", HUB, {"train_split": "validation", "validation_split": "test"}, "trained on the study's"),
        ("finetune", HUB, {"train_split": "train+validation", "validation_split": "test"}, "trained on the study's"),
        ("finetune", HUB, {"validation_split": "other + validation[:50%]"}, "own evaluation data"),
        ("finetune", HUB, {"validation_split": "other+more"}, None),
        ("finetune", {"train_file": "a", "validation_file": "b{seed}"}, {"validation_file": "b1"}, "own evaluation"),
        ("finetune", {"train_file": "a", "validation_file": "b{seed}"}, {"validation_file": "b7"}, None),
        ("language_model", TEXT, {"validation_split_percentage": 20}, "own evaluation data"),
        ("language_model", TEXT, {"train_file": "part.txt"}, None),
        (
            "language_model",
            TEXT,
            {"validation_split_percentage": None, "validation_file": "c.txt"},
            "trained on the study's",
        ),
        ("language_model", FILES, {"validation_file": None, "validation_split_percentage": 5}, None),
        ("transduction", {"train_file": "a", "validation_file": "b"}, {"validation_file": "c"}, None),
        ("transduction", {"train_file": "a", "validation_file": "b"}, {}, "own evaluation data"),
        ("story_qa", {"facts": 5}, {"data_seed": 7}, None),
        ("story_qa", {"facts": 5}, {"facts": 6}, "own evaluation data"),
        ("finetune", HUB, {"train_split": "validation[:50%]", "validation_split": "test"}, "trained on the study's"),
        (
            "language_model",
            TEXT,
            {"validation_split_percentage": None, "train_file": "c.txt", "validation_file": "a.txt"},
            "own evaluation data",
        ),
        (
            "language_model",
            {"model_name_or_path": "gpt2", "dataset_name": "d", "validation_split_percentage": 10},
            {"validation_split": "test"},
            "own evaluation data",
        ),
    ],
)
def test_every_script_tells_its_evaluation_data(
    tmp_path: Path, script: str, base: dict[str, Any], settings: dict[str, Any], message: str | None
) -> None:
    check_search(tmp_path, script, base, settings, message)


PAIR = {"train_file": "a", "validation_file": "b"}
HELD = {"holdout_percentage": 20}


@pytest.mark.parametrize(
    ("script", "base", "settings", "message"),
    [
        ("finetune", HUB, HELD, None),
        ("finetune", PAIR, HELD, None),
        ("finetune", HUB, HELD | {"train_split": "validation"}, "own evaluation data"),
        ("finetune", PAIR, HELD | {"train_file": "b"}, "own evaluation data"),
        ("finetune", PAIR | HELD, {"holdout_percentage": 10}, "own evaluation data"),
        ("finetune", PAIR | HELD, {"data_seed": 7}, "own evaluation data"),
        ("finetune", PAIR | HELD, {"holdout_percentage": None}, "trained on the study's"),
        ("finetune", HUB | HELD, {"train_split": "train"}, "own evaluation data"),
        ("finetune", PAIR | HELD, {"holdout_percentage": None, "train_file": "c"}, None),
        ("language_model", TEXT, HELD, None),
        ("language_model", TEXT, HELD | {"validation_split_percentage": 12}, None),
        ("language_model", TEXT, HELD | {"validation_split_percentage": 9}, "own evaluation data"),
        ("language_model", TEXT, HELD | {"validation_split_percentage": None}, "own evaluation data"),
        ("language_model", TEXT, HELD | {"sample_by": "line"}, "own evaluation data"),
        ("language_model", TEXT | HELD, {"holdout_percentage": None}, "trained on the study's"),
        ("language_model", FILES, HELD, None),
        ("language_model", FILES, HELD | {"validation_file": None}, None),
        ("language_model", FILES, HELD | {"train_file": "b.txt"}, "own evaluation data"),
        ("story_qa", {"facts": 5}, HELD, None),
        ("story_qa", {"facts": 5} | HELD, {"holdout_percentage": None}, "trained on the study's"),
        ("story_qa", {"facts": 5} | HELD, {"data_seed": 7}, None),
        ("story_qa", PAIR, HELD, None),
        ("story_qa", PAIR, HELD | {"train_file": "b"}, "own evaluation data"),
    ],
)
def test_a_search_may_hold_out_training_data_that_the_study_does_not_evaluate_on(
    tmp_path: Path, script: str, base: dict[str, Any], settings: dict[str, Any], message: str | None
) -> None:
    check_search(tmp_path, script, base, settings, message)


def check_search(
    folder: Path, script: str, base: dict[str, Any], settings: dict[str, Any], message: str | None
) -> None:
    """Reads a study whose search has these settings; ``message`` is that of the refusal, None if there is none."""
    search = {**SEARCH, "settings": settings}
    path = write_study(folder, script=script, metric="loss", base=base, search=search, arms=STUDY["arms"])
    if message is None:
        assert load_study(path).search is not None
        return
    with pytest.raises(UsageError, match=message):
        load_study(path)
