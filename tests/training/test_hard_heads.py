"""Accuracy by the number of hard layers, what choices depend on, and the script that measures both."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import run

import gumbel_attention as ga
import hard_heads
from harness.fixed_keys import fix_keys
from harness.hard_heads import choices_of, dependence, hardness_curves
from models import build
from study.plan import load_study


def test_curves_make_the_layers_hard_in_both_orders_and_leave_the_patch_alone() -> None:
    model = build("bert")
    patch = ga.patch_model(model, ga.GumbelAttentionConfig(hard=True))
    states = [module.gumbel for module in model.modules() if hasattr(module, "gumbel")]

    def which() -> Any:
        assert {state.noise(training=True) for state in states} == {"none"}
        return tuple(state.hard(training=False) for state in states)

    curves = hardness_curves(patch, which)
    assert curves == {
        "top_down": [(False, False), (False, True), (True, True)],
        "bottom_up": [(False, False), (True, False), (True, True)],
    }
    assert [state.hard_override for state in states] == [None, None]
    assert [state.noise_override for state in states] == [None, None]


def test_choices_count_tokens_without_padding() -> None:
    model = build("bert").eval()
    fix_keys(model, "own")
    ids = torch.randint(5, 50, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    first, second = choices_of(model, [{"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(2)}])
    assert first.shape == (2, 4, 4)
    assert torch.equal(first, torch.arange(4).expand(2, 4, 4))
    assert torch.equal(second, torch.arange(5).expand(2, 4, 5))


def test_dependence_by_hand() -> None:
    """One layer; head 0 looks at the first token, head 1 at its own but for one query in one of four sentences."""
    own = torch.arange(3)
    sentences = [torch.stack([torch.zeros(3, dtype=torch.int64), own])[None].clone() for _ in range(4)]
    sentences[3][0, 1, 1] = 2
    alone = torch.stack([torch.zeros(7, dtype=torch.int64), torch.arange(7)])[None]
    found = dependence([*sentences, alone])
    assert {name: value[0, 0].item() for name, value in found.items() if name in ("varies", "differs", "bits")} == {
        "varies": 0.0,
        "differs": 0.0,
        "bits": 0.0,
    }
    assert found["varies"][0, 1].item() == pytest.approx(1 / 3)
    assert found["differs"][0, 1].item() == pytest.approx((3 / 6) / 3)  # of the six pairs, three differ
    assert found["bits"][0, 1].item() == pytest.approx(0.811278 / 3, rel=1e-5)  # of one in four
    assert found["first"][0].tolist() == pytest.approx([1.0, 5 / 19])
    assert found["own"][0].tolist() == pytest.approx([5 / 19, 18 / 19])
    assert found["last"][0, 1].item() == pytest.approx(6 / 19)
    with pytest.raises(ValueError, match="no two of the 2 sequences"):
        dependence([alone, sentences[0]])


@pytest.mark.parametrize("kind", ["first", "own", "random"])
def test_a_fixed_choice_depends_on_nothing_and_a_free_one_does(kind: str) -> None:
    batches = [{"input_ids": torch.randint(5, 50, (8, length))} for length in (5, 9)]
    model = build("bert").eval()
    with pytest.raises(ValueError, match="no attention weights"):
        choices_of(model, batches)
    with ga.patch_model(model, ga.GumbelAttentionConfig(noise="none")):
        assert dependence(choices_of(model, batches))["differs"].min() > 0.1
    fix_keys(model, kind)
    assert dependence(choices_of(model, batches))["differs"].max() == 0.0


@pytest.mark.parametrize("arm", [{"hard": True}, {"attention": "unpatched"}])
def test_the_script_reports_on_a_run(
    settings: dict[str, Any], arm: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(settings, save_model=True, **arm)
    hard_heads.main([settings["output_dir"]])
    report = json.loads(Path(settings["output_dir"], "hard_heads.json").read_text())
    curves = report["accuracy_by_hard_layers"]
    own = curves["top_down"][-1 if "hard" in arm else 0]
    assert own == record.final["noise_off"]["accuracy"]
    assert [len(values) for values in curves.values()] == [3, 3]
    assert set(report["accuracy_with_fixed_keys"]) == {"first", "own", "random"}
    assert torch.tensor(report["dependence"]["differs"]).shape == (2, 2)
    assert "| hard layers | 0 | 1 | 2 |" in capsys.readouterr().out


def test_the_script_sums_up_two_seeds_of_two_arms(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {"softmax": {"attention": "unpatched"}, "hardened": {"hard": True, "noise": "none"}}
    folders = [str(tmp_path / "work" / f"{arm}-seed{seed}-1a2b3c4d") for arm in arms for seed in (0, 1)]
    for number, folder in enumerate(folders):
        arm, seed = list(arms.values())[number // 2], number % 2
        run(settings, save_model=True, output_dir=folder, seed=seed, learning_rate=0.01 * (1 + seed), **arm)
    summary = tmp_path / "summary"
    hard_heads.main([*folders, "--output", str(summary), "--max_eval_samples", "10"])
    reports = [json.loads(Path(folder, "hard_heads.json").read_text()) for folder in folders]
    assert [report["sentences"] for report in reports] == [10] * 4
    content = json.loads((summary / "hard_heads.json").read_text())
    assert [(row["arm"], row["seed"]) for row in content["runs"]] == [
        ("softmax", 0),
        ("softmax", 1),
        ("hardened", 0),
        ("hardened", 1),
    ]
    text = (summary / "hard_heads.md").read_text()
    for number, (row, report) in enumerate(zip(content["runs"], reports, strict=True)):
        assert row["accuracy_by_hard_layers"] == report["accuracy_by_hard_layers"]
        assert row["dependence"]["differs"][1] == pytest.approx(sum(report["dependence"]["differs"][1]) / 2)
        if number % 2 == 0:
            curves = [found["accuracy_by_hard_layers"]["bottom_up"] for found in reports[number : number + 2]]
            cells = [f"{(a + b) / 2:.4f} ± {12.706205 * abs(a - b) / 2:.4f}" for a, b in zip(*curves, strict=True)]
            assert f"| {row['arm']} | bottom up | {' | '.join(cells)} |" in text
    assert "`python training/hard_heads.py softmax-seed0-1a2b3c4d" in text
    assert "--output summary --max_eval_samples 10`" in text
    assert str(tmp_path) not in text + json.dumps(content)
    assert (summary / "hard_layers.png").read_bytes().startswith(b"\x89PNG")
    assert "hardened-seed1-1a2b3c4d\n\n| hard layers | 0 | 1 | 2 |" in capsys.readouterr().out
    for folder in folders[1:]:
        shutil.rmtree(Path(folder, "model"))
    Path(folders[1], "config.yaml").unlink()
    hard_heads.main([*folders, "--output", str(summary), "--max_eval_samples", "10"])
    assert json.loads((summary / "hard_heads.json").read_text()) == content, "one measured again, three as before"


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({}, ["--max_eval_samples", "5"], "cannot be measured with 5"),
        ({"versions": {"torch": "1.0"}}, [], "measured with different versions: measure both on one machine"),
        ({"config": None}, [], "it has no config"),
    ],
)
def test_reports_that_do_not_fit_are_refused(
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    words: list[str],
    message: str,
) -> None:
    folders = [tmp_path / "a-seed0", tmp_path / "a-seed1"]
    run(settings, save_model=True, max_train_steps=1, output_dir=str(folders[0]))
    hard_heads.main([str(folders[0])])
    report = json.loads((folders[0] / "hard_heads.json").read_text())
    folders[1].mkdir()
    report = {name: value for name, value in (report | change).items() if value is not None}
    (folders[1] / "hard_heads.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit) as stopped:
        hard_heads.main([*map(str, folders), "--output", str(tmp_path / "summary"), *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_that_make_no_summary_are_refused_before_anything_is_measured(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, same, other, bare = (str(tmp_path / name) for name in ("a-seed0-11", "a-seed0-22", "a-seed1", "a-seed2"))
    run(settings, save_model=True, max_train_steps=1, output_dir=first)
    for copy in (same, other, bare):
        shutil.copytree(first, copy)
    config = Path(other, "config.yaml")
    config.write_text(config.read_text().replace("dev.tsv", "train.tsv"))
    shutil.rmtree(Path(bare, "model"))
    (tmp_path / "file").write_text("")

    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            hard_heads.main(list(words))
        assert stopped.value.code == 2
        return capsys.readouterr().err

    new = str(tmp_path / "new")
    assert "arm 'a', seed 0" in refused(first, same, "--output", new)
    assert "different data: data: file " in refused(first, other, "--output", new)
    assert "save_model: true" in refused(first, bare, "--output", new)
    assert not Path(new).exists()
    assert "cannot be made: File exists" in refused(first, "--output", str(tmp_path / "file"))
    assert "is the folder of a run" in refused(first, "--output", first)
    assert not list(tmp_path.rglob("hard_heads.json"))


def test_a_folder_without_a_saved_model_is_refused(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings, max_train_steps=1)
    with pytest.raises(SystemExit) as stopped:
        hard_heads.main([settings["output_dir"]])
    assert stopped.value.code == 2
    assert "save_model: true" in capsys.readouterr().err


def test_the_command_in_the_studys_file_takes_each_saved_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside folders of the search, and of an arm whose name begins like another's."""
    monkeypatch.setenv("SST2_DIR", "/folder")
    path = Path(hard_heads.__file__).parents[1] / "configs" / "ablation" / "hard_minilm.yaml"
    study = load_study(path)
    command = re.search(r"python training/hard_heads.py (.*?) --output", re.sub(r"\\\n#", "", path.read_text()))
    assert command is not None
    assert study.search is not None
    folders = [f"results/hard_minilm/work/{run.id}" for run in (*study.runs, *study.search.runs)]
    taken = [Path(folder).name for pattern in command[1].split() for folder in fnmatch.filter(folders, pattern)]
    assert sorted(taken) == sorted(run.id for run in study.runs if getattr(run.args, "save_model", False))
    assert len(taken) == 10
