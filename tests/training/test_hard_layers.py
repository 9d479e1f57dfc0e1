"""The summary of several runs of hard_heads.py: names, refused runs, numbers, table and plot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness.arguments import FinetuneArguments
from harness.errors import UsageError
from harness.hard_heads import MEASURES
from study.hard_layers import Measured, Run, check_measured, check_runs, make_folder, plot, write_summary

ENVIRONMENT = {
    "device": "cpu (fake)",
    "num_processes": 1,
    "num_threads": 1,
    "versions": {"python": "3.11", "torch": "2.13"},
}


def run_of(name: str, **settings: Any) -> Run:
    files = {"train_file": "/data/train.tsv", "validation_file": "/data/dev.tsv"}
    return Run(Path("work", name), FinetuneArguments(**{**files, **settings}))


def measured(name: str, shift: float = 0.0, sentences: int = 50, layers: int = 2, **settings: Any) -> Measured:
    """A report whose accuracies are ``shift`` above round ones; two heads in each layer, 0.1 apart."""
    curve = [0.5 + shift + 0.1 * hard for hard in range(layers + 1)]
    report = {
        "sentences": sentences,
        "accuracy_by_hard_layers": {"top_down": curve, "bottom_up": [*curve[:1], 0.25 + shift, *curve[2:]]},
        "accuracy_with_fixed_keys": {"first": 0.3 + shift, "own": 0.35, "random": 0.4},
        "dependence": {
            measure: [[0.1 * layer + shift, 0.1 * layer + shift + 0.1] for layer in range(layers)]
            for measure in MEASURES
        },
        "config": {"output_dir": "/home/someone/work"},
        "git": {"commit": f"of {name}"},
        **ENVIRONMENT,
    }
    return Measured(run_of(name, **settings), report)


@pytest.mark.parametrize(
    ("name", "arm", "seed"),
    [
        ("softmax-seed0-1a2b3c4d", "softmax", 0),
        ("hard-at-once-seed12", "hard-at-once", 12),
        ("a-seed1-seed2-00000000", "a-seed1", 2),
        ("recipe_0", "recipe_0", 7),
        ("seed3", "seed3", 7),
        ("softmax-seed0-again", "softmax-seed0-again", 7),
    ],
)
def test_arm_and_seed_come_from_the_folder_or_the_settings(name: str, arm: str, seed: int) -> None:
    run = run_of(name, seed=7)
    assert (run.arm, run.seed) == (arm, seed)


def test_means_and_half_widths_by_hand(tmp_path: Path) -> None:
    """Two seeds 0.02 apart: the half width is 12.7062 * 0.02 / 2."""
    runs = [
        measured("hardened-seed1-0000000b", 0.02, seed=1, hard=True),
        measured("softmax-seed0-0000000c", 0.1),
        measured("softmax-seed1-0000000d", 0.2, seed=1),
        measured("hardened-seed0-0000000a", hard=True),
    ]
    write_summary(runs, tmp_path, "python training/hard_heads.py RUNS")
    lines = (tmp_path / "hard_heads.md").read_text().splitlines()
    assert "| hardened | top down | 0.5100 ± 0.1271 | 0.6100 ± 0.1271 | 0.7100 ± 0.1271 |" in lines
    assert "| hardened | bottom up | 0.5100 ± 0.1271 | 0.2600 ± 0.1271 | 0.7100 ± 0.1271 |" in lines
    assert "| softmax | top down | 0.6500 ± 0.6353 | 0.7500 ± 0.6353 | 0.8500 ± 0.6353 |" in lines
    assert "| hardened | 0.3100 ± 0.1271 | 0.3500 ± 0.0000 | 0.4000 ± 0.0000 |" in lines
    assert f"| softmax | 1 |{' 0.300 ± 0.635 |' * 6}" in lines
    text = "\n".join(lines)
    assert "dev.tsv, 50 sentences" in text
    assert "seeds: `hardened`: 0, 1; `softmax`: 0, 1." in text
    assert text.rstrip().endswith("`python training/hard_heads.py RUNS`: cpu (fake); python 3.11, torch 2.13.")

    content = json.loads((tmp_path / "hard_heads.json").read_text())
    assert [(row["arm"], row["seed"]) for row in content["runs"]] == [
        ("hardened", 0),
        ("hardened", 1),
        ("softmax", 0),
        ("softmax", 1),
    ]
    last = content["runs"][-1]
    assert last["run"] == "softmax-seed1-0000000d"
    assert last["settings"] == {"hard": False}
    assert last["accuracy_by_hard_layers"] == runs[2].curves
    assert last["dependence"]["bits"] == pytest.approx([0.25, 0.35])
    assert content["evaluated_on"] == {
        "data": "dev.tsv",
        "text_column": "sentence",
        "text_pair_column": None,
        "label_column": "label",
        "max_length": 128,
        "max_eval_samples": None,
        "sentences": 50,
    }
    assert {name: content[name] for name in ENVIRONMENT} == ENVIRONMENT
    assert [row["git"] for row in content["runs"]] == [{"commit": f"of {row['run']}"} for row in content["runs"]]


def test_files_are_small_and_name_no_folder_of_a_machine(tmp_path: Path) -> None:
    teachers = {f"{arm}-seed{seed}": f"/teachers/{seed}" for arm in ("a", "b") for seed in range(5)}
    runs = [measured(name, layers=12, distill_from=teacher) for name, teacher in teachers.items()]
    write_summary(runs, tmp_path, "python training/hard_heads.py RUNS")
    written = {path.name: path for path in tmp_path.iterdir()}
    assert set(written) == {"hard_heads.json", "hard_heads.md", "hard_layers.png"}
    assert written["hard_heads.json"].stat().st_size < 100_000
    for name in ("hard_heads.json", "hard_heads.md"):
        assert not re.search(r'[\s"`(]/\w', written[name].read_text())
    assert json.loads(written["hard_heads.json"].read_text())["runs"][1]["settings"] == {"distill_from": "1"}
    with Image.open(written["hard_layers.png"]) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
    assert written["hard_layers.png"].stat().st_size < 200_000


def test_the_plot_has_a_line_for_each_arm_and_order_and_a_dot_for_each_seed() -> None:
    figure = plot([measured("a-seed0"), measured("a-seed1", 0.1), measured("b-seed0", 0.2)])
    axes = figure.axes[0]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["a, top down", "a, bottom up", "b, top down", "b, bottom up", "single seed"]
    means = [bar.lines[0].get_ydata().tolist() for bar in axes.containers]
    assert means[0] == pytest.approx([0.55, 0.65, 0.75])
    assert means[3] == pytest.approx([0.7, 0.45, 0.9])
    for bar in axes.containers:
        assert [round(place) for place in bar.lines[0].get_xdata()] == [0, 1, 2]
    dots = [line for line in axes.lines if line.get_marker() == "." and len(line.get_ydata())]
    assert sorted(len(line.get_ydata()) for line in dots) == [1] * 6 + [2] * 6


def test_the_plot_shows_seeds_that_lie_far_outside_the_interval() -> None:
    """Of twelve seeds, one 0.5 below the others: the interval ends far above it."""
    axes = plot([measured(f"a-seed{seed}", -0.5 * (seed == 0)) for seed in range(12)]).axes[0]
    low, high = axes.get_ylim()
    assert low < -0.25
    assert high > 0.7


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    write_summary([measured("recipe")], tmp_path, "command")
    assert "| recipe | top down | 0.5000 | 0.6000 | 0.7000 |" in (tmp_path / "hard_heads.md").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validation_file": "/data/test.tsv"}, r"data: file /data/dev\.tsv and file /data/test\.tsv"),
        ({"holdout_percentage": 10}, "holdout_percentage: None and 10"),
        ({"max_eval_samples": 20}, "max_eval_samples: None and 20"),
        ({"text_column": "text"}, "text_column: sentence and text"),
        ({"max_length": 16}, "max_length: 128 and 16"),
    ],
)
def test_runs_evaluated_on_different_data_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"different data: .*{words}"):
        check_runs([run_of("a-seed0"), run_of("a-seed1", **changes)])


def test_only_settings_that_choose_evaluation_data_must_agree() -> None:
    check_runs(
        [run_of("a-seed0"), run_of("b-seed0", data_seed=1, max_train_samples=9, train_file="/else.tsv", tau=2.0)]
    )
    held = {"holdout_percentage": 10, "max_eval_samples": 5}
    check_runs([run_of("a-seed0", holdout_percentage=10), run_of("b-seed0", **held)])
    for changes in ({"data_seed": 1}, {"max_train_samples": 9}, {"train_file": "/data/else.tsv"}):
        with pytest.raises(UsageError, match="different data"):
            check_runs([run_of("a-seed0", **held), run_of("b-seed0", **held, **changes)])
    with pytest.raises(UsageError, match="data_seed: 0 and 1"):
        check_runs([run_of("a-seed0", max_eval_samples=5), run_of("b-seed0", max_eval_samples=5, data_seed=1)])


def test_each_seed_of_an_arm_counts_once() -> None:
    with pytest.raises(UsageError, match="arm 'a', seed 0: a summary takes each seed of an arm once"):
        check_runs([run_of("a-seed0-11111111"), run_of("b-seed0"), run_of("a-seed0-22222222")])


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"sentences": 49}, "50 sentences, .* 49"), ({"layers": 3}, "2 layers that can be hard, .* 3")],
)
def test_reports_of_other_sizes_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    runs = [measured("a-seed0"), measured("b-seed0", **changes)]
    with pytest.raises(UsageError, match=words):
        check_measured(runs)
    with pytest.raises(UsageError, match=words):
        write_summary(runs, tmp_path, "command")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "new" / "folder", [run_of("a")])
    assert (tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"--output .*file.* cannot be made"):
            make_folder(folder, [run_of("a")])
    plain, winding = tmp_path / "new", tmp_path / "file" / ".." / "new"
    for folder, other in ((plain, winding), (winding, plain)):
        with pytest.raises(UsageError, match="is the folder of a run"):
            make_folder(folder, [Run(other, run_of("a").args)])
