"""From the YAML file of a study to its runs: ids, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import STUDY, write_study

from harness.errors import UsageError
from study.folder import read_study
from study.folder import write_study as write_study_file
from study.plan import load_study
from study.questions import Condition
from study.scripts import SCRIPTS

CONFIGS = Path(__file__).parents[2] / "configs" / "ablation"
SST2_IDS = """
softmax-tau-seed0-f40fe4c7 softmax-tau-seed1-c1c63b8a softmax-tau-seed2-fa3ff9e7 gumbel-soft-seed0-4ce9b10f
gumbel-soft-seed1-23088e93 gumbel-soft-seed2-3dac0317 gumbel-st-seed0-abe1f07d gumbel-st-seed1-e8b24c5b
gumbel-st-seed2-0398fa51 det-st-seed0-9a468e80 det-st-seed1-85deb6b2 det-st-seed2-bbb808b6
"""
SHAKESPEARE_IDS = """
softmax-seed0-382f360a softmax-seed1-878acbc9 softmax-seed2-2889ff2b softmax-tau-seed0-1fa31224
softmax-tau-seed1-48cd1238 softmax-tau-seed2-5773138f gumbel-soft-seed0-71f64c1f gumbel-soft-seed1-65227d19
gumbel-soft-seed2-b7714d98 gumbel-st-seed0-59bf89f1 gumbel-st-seed1-08fadea1 gumbel-st-seed2-9244971c
"""
QUESTION: dict[str, Any] = {
    "id": "noise",
    "text": "Does noise help?",
    "compare": {"arm": "soft", "mode": "noise_on"},
    "against": {"arm": "plain"},
}


@pytest.mark.parametrize(("name", "ids"), [("sst2_minilm", SST2_IDS), ("tinyshakespeare", SHAKESPEARE_IDS)])
def test_ids_of_the_first_studies_stay(name: str, ids: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were when the files came, with the data in the folders that the environment names here."""
    monkeypatch.setenv("SST2_DIR", "../shared/data/sst2")
    monkeypatch.setenv("TINYSHAKESPEARE_DIR", "../shared/data/tinyshakespeare")
    runs = load_study(CONFIGS / f"{name}.yaml").runs
    assert set(ids.split()) <= {run.id for run in runs}


def test_runs_are_arms_times_seeds(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    assert [(run.arm, run.seed) for run in study.runs] == [("soft", 0), ("soft", 1), ("plain", 0), ("plain", 1)]
    assert [run.args.noise for run in study.runs] == ["gumbel", "gumbel", "none", "none"]
    assert all(run.args.tau == 2.0 and run.args.seed == run.seed for run in study.runs)
    assert len(study.runs[0].id.removeprefix("soft-seed0-")) == 8
    assert (study.title, study.script, study.metric, study.better) == ("plan", "finetune", "accuracy", "higher")
    again = load_study(write_study(tmp_path), output_dir=str(tmp_path / "elsewhere"))
    assert [run.id for run in again.runs] == [run.id for run in study.runs]
    other = load_study(write_study(tmp_path, base={**STUDY["base"], "tau": 3.0}))
    assert not {run.id for run in other.runs} & {run.id for run in study.runs}


def test_a_path_may_name_the_seed(tmp_path: Path) -> None:
    base = {**STUDY["base"], "distill_from": "teachers/seed{seed}/model"}
    runs = load_study(write_study(tmp_path, base=base)).runs
    assert [run.args.distill_from for run in runs] == [f"teachers/seed{run.seed}/model" for run in runs]
    assert len({run.args.distill_from for run in runs}) == 2


def test_settings_that_decide_nothing_do_not_change_an_id(tmp_path: Path) -> None:
    ids = [run.id for run in load_study(write_study(tmp_path)).runs]
    explicit = {"samples": None, "max_grad_norm": 1.0, "checkpointing_steps": 5, "keep_last": 1, "report_to": "all"}
    assert [run.id for run in load_study(write_study(tmp_path, base={**STUDY["base"], **explicit})).runs] == ids
    other = {**STUDY["base"], "max_grad_norm": 2.0}
    assert not set(ids) & {run.id for run in load_study(write_study(tmp_path, base=other)).runs}


BASES: dict[str, dict[str, Any]] = {
    "finetune": {"train_file": "a.tsv", "validation_file": "b.tsv"},
    "language_model": {"model_name_or_path": "gpt2", "train_file": "a.txt", "validation_file": "b.txt"},
    "transduction": {"train_file": "a", "validation_file": "b"},
    "story_qa": {"architecture": "memory_network"},
}


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_every_script_can_be_studied(tmp_path: Path, script: str) -> None:
    study = load_study(write_study(tmp_path, script=script, base=BASES[script], metric="loss"))
    assert {run.script for run in study.runs} == {script}
    assert {type(run.args) for run in study.runs} == {SCRIPTS[script].arguments}
    assert study.better == "lower"
    assert (Path(__file__).parents[2] / "training" / f"{script}.py").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, r"unknown setting seed in .*mean seeds\?"),
        ({"arms": {"soft": {"nosie": "none"}}}, r"unknown setting nosie in arm 'soft' of .*mean noise\?"),
        ({"base": {"train_flie": "a"}}, r"unknown setting train_flie in base of .*mean train_file\?"),
        ({"arms": {"soft": {"noise": "gumble"}}}, "attention settings: noise"),
        ({"arms": {"soft": {"seed": 3}}}, "seed is set by the study"),
        ({"base": {"output_dir": "x"}}, "output_dir is set by the study"),
        ({"base": {"dry_run": True}}, "dry_run is set by the study"),
        ({"arms": {}}, "at least one arm"),
        ({"arms": {"a/b": {}}}, "name of an arm"),
        ({"arms": {"a": {"tau": 1.0}, "A": {"tau": 3.0}}}, "differ in case only"),
        ({"arms": ["soft"]}, "expected a mapping"),
        ({"seeds": 3}, "expected a list of integers"),
        ({"seeds": []}, "expected a list of integers"),
        ({"seeds": [1, True]}, "expected a list of integers"),
        ({"seeds": [1, 1]}, "holds a seed twice"),
        ({"output_dir": None}, "expected a folder name"),
        ({"title": "a\nb"}, "expected one line"),
        ({"script": "quickstart"}, "expected one of finetune, language_model, transduction, story_qa"),
        ({"metric": 3}, "expected one of the metrics of finetune"),
        ({"metric": "bleu"}, "accuracy, f1_macro, .*; got 'bleu'"),
        ({"better": "lower"}, "higher values of accuracy are better"),
        ({"better": "more"}, "expected higher or lower"),
        ({"reference": "sfot"}, "no arm is called 'sfot'; the arms are soft, plain"),
        ({"arms": {"soft": {}, "plain": {"noise": "none"}}}, r"'soft' .* differs from the base in nothing"),
        ({"arms": {"soft": {"tau": 2.0}, "plain": {"noise": "none"}}}, r"'soft' .* differs from the base in nothing"),
        ({"arms": {"a": {"noise": "none"}, "b": {"noise": "none"}}}, "arms 'a' and 'b' .* have equal settings"),
        ({"arms": {"a": {"noise": "gumbel"}, "b": {"hard": False}}}, "arms 'a' and 'b' .* have equal settings"),
        ({"questions": {}}, "questions in .* expected a list"),
    ],
)
def test_mistakes_in_the_study_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_study(write_study(tmp_path, **changes))


def test_the_reference_may_be_the_base_itself(tmp_path: Path) -> None:
    arms = {"plain": {}, "soft": {"hard": True}}
    study = load_study(write_study(tmp_path, arms=arms, reference="plain"))
    assert study.reference == "plain"
    with pytest.raises(UsageError, match="equal settings"):
        load_study(write_study(tmp_path, arms={**arms, "same": {"tau_schedule": "constant"}}, reference="plain"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [0]\nseeds: [1]\n", "'seeds' is there twice, in lines 1 and 2"),
        ("arms:\n  soft: {tau: 1.0}\n  plain: {}\n  soft: {tau: 2.0}\n", "'soft' is there twice, in lines 2 and 4"),
        ("base: {tau: 1.0, hard: true, tau: 2.0}\n", "'tau' is there twice"),
        ("- 1\n", "must hold a mapping"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_yaml_that_says_a_thing_twice(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_study(tmp_path / "plan.yaml")


def test_merged_yaml_may_override(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(
        "output_dir: x\nseeds: [0]\nbase: &base {train_file: a.tsv, validation_file: b.tsv, tau: 2.0}\n"
        "arms:\n  other: {<<: *base, tau: 3.0}\n"
    )
    assert load_study(tmp_path / "plan.yaml").runs[0].args.tau == 3.0


def test_questions_are_read(tmp_path: Path) -> None:
    question = load_study(write_study(tmp_path, questions=[QUESTION])).questions[0]
    assert (question.compare, question.against) == (Condition("soft", "noise_on"), Condition("plain", "noise_off"))
    assert (question.id, question.text, question.metric) == ("noise", "Does noise help?", "accuracy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"txet": "x"}, r"unknown setting txet in question 1 of .*mean text\?"),
        ({"id": None}, "expected an id"),
        ({"text": ""}, "question in words"),
        ({"metric": "bleu"}, "no metric 'bleu'; the script has accuracy"),
        ({"compare": {"arm": "sfot"}}, "no arm is called 'sfot'; the arms are soft, plain"),
        ({"compare": {"mode": "hard"}}, "no arm is called None"),
        ({"compare": {"arm": "soft", "mode": "hard"}}, "not evaluated in mode 'hard', but in noise_off, noise_on"),
        ({"compare": {"arm": "soft", "seed": 1}}, "unknown setting seed in compare"),
        ({"compare": "soft"}, "expected {arm"),
        ({"compare": {"arm": "plain"}}, "with itself"),
    ],
)
def test_questions_about_what_there_is_not(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_study(write_study(tmp_path, questions=[{**QUESTION, **changes}]))


def test_questions_need_what_answers_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="need at least 2 seeds to be tested, got 1"):
        load_study(write_study(tmp_path, questions=[QUESTION], seeds=[0]))
    with pytest.raises(UsageError, match="the id 'noise' is there twice"):
        load_study(write_study(tmp_path, questions=[QUESTION, QUESTION]))
    with pytest.raises(UsageError, match="has no compare, against"):
        load_study(write_study(tmp_path, questions=[{"id": "a", "text": "b"}]))
    arms = {"unpatched": {"attention": "unpatched"}, "plain": {"noise": "none"}}
    path = write_study(
        tmp_path, arms=arms, questions=[{**QUESTION, "compare": {"arm": "unpatched", "mode": "noise_on"}}]
    )
    with pytest.raises(UsageError, match="'unpatched' is not evaluated in mode 'noise_on'"):
        load_study(path)


def test_modes_that_the_settings_ask_for_may_be_asked_about(tmp_path: Path) -> None:
    base = {**STUDY["base"], "eval_modes": ["noise_off", "mean_4", "hard"]}
    compare = {"arm": "soft", "mode": "mean_4"}
    study = load_study(write_study(tmp_path, base=base, questions=[{**QUESTION, "compare": compare}]))
    assert study.questions[0].compare.mode == "mean_4"


def test_the_folder_keeps_a_copy_from_which_the_study_is_read_again(tmp_path: Path) -> None:
    path = write_study(tmp_path, questions=[QUESTION], reference="plain", title="Noise")
    study = load_study(path)
    write_study_file(study)
    read = read_study(tmp_path / "out")
    assert read == study
    content = yaml.safe_load((tmp_path / "out" / "study.yaml").read_text())
    assert content["planned"]["runs"] == [run.id for run in study.runs]
    (tmp_path / "out").rename(tmp_path / "moved")
    assert [run.id for run in read_study(tmp_path / "moved").runs] == [run.id for run in study.runs]


def test_the_folder_of_another_study_is_refused_unless_told(tmp_path: Path) -> None:
    write_study_file(load_study(write_study(tmp_path)))
    write_study_file(load_study(write_study(tmp_path, title="a better title", reference="soft")))
    other = load_study(write_study(tmp_path, base={**STUDY["base"], "tau": 3.0}, seeds=[0, 1, 2]))
    with pytest.raises(UsageError, match=r"another study; .*base\.tau: 2\.0 -> 3\.0; seeds: \[0, 1\] -> \[0, 1, 2\]"):
        write_study_file(other)
    write_study_file(other, replace=True)
    assert read_study(tmp_path / "out").seeds == (0, 1, 2)
