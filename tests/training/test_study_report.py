"""The report of a study: known numbers in, exact cells and sentences out, one page that needs nothing else."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_folders import MODES, make_study, question
from scipy import stats

import report
from harness.errors import UsageError
from study.figures import plots
from study.findings import Findings, estimate, read_findings
from study.folder import read_study
from study.page import page
from study.tables import (
    arms_table,
    cost_table,
    difference_table,
    metric_table,
    other_metrics_table,
    search_table,
    write_table,
)

ARMS = {"plain": {"noise": "none"}, "noisy": {"noise": "gumbel"}}
SPREAD = (0.0, 0.01, -0.02, 0.015, 0.005)
SMALL = (0.001, -0.0012, 0.0004, 0.0, -0.0003)
PROBE = Path(__file__).parents[2] / "results" / "local_minimum"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags close in order; gathers what a page refers to, its text and its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster", "style"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(text: str) -> Page:
    found = Page()
    found.feed(text)
    found.close()
    assert found.open == []
    return found


def value(arm: str, seed: int, mode: str) -> float:
    """A planted gain of 0.05 for the noisy arm, none between its modes."""
    return 0.8 + SPREAD[seed] + (0.05 + SMALL[seed] if arm == "noisy" else 0.0)


def small_study(folder: Path, modes: Any = ("noise_off", "noise_on"), **more: Any) -> Path:
    make_study(folder, value, ARMS, modes=modes, **more)
    return folder


def with_attention(row: dict[str, Any]) -> None:
    row["series"]["train"] = [
        {"step": step, "loss": 1 / step, "attention": {"entropy": 2.0, "argmax_flip_rate": 0.1}} for step in (10, 20)
    ]
    row["series"]["evaluation"] = [
        {"step": step, "mode": "noise_off", "right_choices": right} for step, right in ((10, "4:90"), (20, "4:c0"))
    ]
    for metrics in row["final"].values():
        metrics |= {"calibration_error": 0.1, "selective_accuracy": 0.9}


def page_of(findings: Findings, command: str = "make it") -> str:
    return page([(findings, plots(findings))], command)


def ids_of(folder: Path) -> list[str]:
    return [plot.id for plot in plots(read_findings(folder)) if plot.figure is not None]


def test_estimate_against_hand_numbers() -> None:
    # s^2 = (0.02^2 + 0 + 0.02^2) / 2, s = 0.02, t(2, 0.975) = 4.302653, half width = 4.302653 * 0.02 / sqrt(3)
    found = estimate([0.80, 0.82, 0.84])
    assert found.mean == pytest.approx(0.82)
    assert found.half_width == pytest.approx(0.0496828, abs=1e-7)
    assert str(found) == "0.8200 ± 0.0497"
    assert str(estimate([0.5])) == "0.5000"
    # s = sqrt(0.5) * 0.2, t(1, 0.975) = 12.706205, half width = 12.706205 * 0.1
    assert estimate([0.4, 0.6]).half_width == pytest.approx(1.2706205, abs=1e-6)
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_cells_are_the_known_numbers(tmp_path: Path) -> None:
    findings = read_findings(small_study(tmp_path / "known", reference="plain"))
    deviation = math.sqrt(sum((x - 0.002) ** 2 for x in SPREAD) / 4)
    half = stats.t.ppf(0.975, 4) * deviation / math.sqrt(5)
    table = metric_table(findings)
    assert list(table.heads) == ["arm", "seeds", "accuracy, noise off", "accuracy, noise on"]
    assert list(table.rows[0]) == ["plain", "5", f"0.8020 ± {half:.4f}", f"0.8020 ± {half:.4f}"]
    assert table.rows[1][2].startswith("0.8520 ± ")
    assert "higher is better" in table.note
    assert "Seeds 0, 1, 2, 3, 4; 10 runs, 0.14 hours in all, cpu (fake); torch 2.13" in table.note
    difference = difference_table(findings)
    assert difference is not None
    mean = 0.05 + sum(SMALL) / 5
    half = stats.t.ppf(0.975, 4) * stats.tstd(SMALL) / math.sqrt(5)
    assert difference.rows[0][1] == f"{mean:+.4f} ± {half:.4f}"
    other, cost = other_metrics_table(findings), cost_table(findings)
    assert other is not None
    assert cost is not None
    assert list(other.rows[0]) == ["plain", "0.5000 ± 0.0000"]
    assert list(cost.rows[0]) == ["plain", "0.5", "300", "51.0"]
    assert list(arms_table(findings).rows[1]) == ["noisy", "gumbel"]


def test_planted_effect_is_better_and_equal_arms_are_not(tmp_path: Path) -> None:
    def planted_or_alike(arm: str, seed: int, mode: str) -> float:
        return value(arm, seed, mode) if arm != "again" else 0.8 + SPREAD[(seed + 2) % 5]

    arms = {**ARMS, "again": {"noise": "none", "tau": 1.5}}
    asked = [question("planted", "noisy", "plain"), question("alike", "again", "plain")]
    make_study(tmp_path / "two", planted_or_alike, arms, questions=asked)
    text = page_of(read_findings(tmp_path / "two"))
    found = parsed(text)
    assert "noisy is better than plain in accuracy (noise_off): +0.05" in found.text
    assert "No difference found between again and plain" in found.text
    assert text.count("<span class='outcome'>better</span>") == 1
    assert text.count("<span class='outcome'>no difference found</span>") == 1
    assert "over 2 questions" in found.text


def test_page_is_one_file_that_refers_to_nothing(tmp_path: Path) -> None:
    folders = [small_study(tmp_path / name, MODES, change=with_attention) for name in ("one", "two")]
    output = tmp_path / "out" / "page.html"
    assert report.main([*map(str, folders), "--output", str(output), "--figures"]) == 0
    text = output.read_text()
    assert len(text.encode()) < 1_000_000
    found = parsed(text)
    assert [link for link in found.references if not link.startswith(("#", "data:image/png;base64,"))] == []
    assert sum(link.startswith("data:") for link in found.references) == 14
    assert len(set(found.ids)) == len(found.ids)
    assert {link[1:] for link in found.references if link.startswith("#")} <= set(found.ids)
    assert not any(word in text for word in ("http:", "https:", "@import", "url(", "<script", str(tmp_path)))
    assert text.count("Command: <code>python training/report.py one two --output page.html --figures</code>") == 14
    assert len(list(output.parent.glob("*.png"))) == 14
    assert (output.parent / "table.md").read_text().count("| plain | 5 | 0.8020 ±") == 2


def test_page_and_table_are_the_same_again(tmp_path: Path) -> None:
    folder = small_study(tmp_path / "known", questions=[question("planted", "noisy", "plain")])
    contents = []
    for _ in range(2):
        assert report.main([str(folder)]) == 0
        contents.append([(folder / name).read_bytes() for name in ("report.html", "table.md", "verdicts.json")])
    assert contents[0] == contents[1]
    verdict = json.loads(contents[0][2])["known"][0]
    assert (verdict["outcome"], verdict["pairs"]["seeds"]) == ("better", [0, 1, 2, 3, 4])
    assert verdict["sentence"] in contents[0][1].decode()


def test_what_is_lacking_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    folder = small_study(tmp_path / "bare")
    assert ids_of(folder) == ["metric", "cost"]
    text = parsed(page_of(read_findings(folder))).text
    assert text.count("Left out: ") == 6
    assert "asks no question" in text


def test_every_plot_is_there_where_the_runs_have_what_it_needs(tmp_path: Path) -> None:
    arms = {**ARMS, "plain-2": {"noise": "none", "tau": 2.0}}
    make_study(tmp_path / "all", value, arms, change=with_attention)
    assert ids_of(tmp_path / "all") == [
        "metric",
        "tau",
        "noise",
        "calibration",
        "attention",
        "exploration",
        "loss",
        "cost",
    ]
    assert "Left out: " not in page_of(read_findings(tmp_path / "all"))


def test_modes_are_in_the_same_order_whatever_the_plan(tmp_path: Path) -> None:
    small_study(tmp_path / "turned", ["soft", "mean_16", "noise_on", "hard", "mean_4", "noise_off"])
    assert read_findings(tmp_path / "turned").modes == list(MODES)


def test_a_mode_that_some_arm_lacks(tmp_path: Path) -> None:
    arms = {**ARMS, "own": {"attention": "unpatched"}}

    def drop(row: dict[str, Any]) -> None:
        if row["arm"] == "own":
            del row["final"]["noise_on"]

    make_study(tmp_path / "gap", value, arms, modes=("noise_off", "noise_on"), change=drop, reference="plain")
    findings = read_findings(tmp_path / "gap")
    difference = difference_table(findings)
    assert difference is not None
    assert metric_table(findings).rows[2][3] == "-"
    assert difference.rows[1][2] == "-"
    parsed(page_of(findings))


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    make_study(tmp_path / "one", value, ARMS, seeds=[0], reference="plain", change=with_attention)
    findings = read_findings(tmp_path / "one")
    difference = difference_table(findings)
    assert difference is not None
    assert metric_table(findings).rows[0][2] == "0.8000"
    assert difference.rows[0][1] == "+0.0510"
    assert "nan" not in parsed(page_of(findings)).text


def test_a_study_that_is_not_finished(tmp_path: Path) -> None:
    asked = [question("early", "noisy", "plain"), question("late", "noisy", "plain-2")]
    make_study(tmp_path / "half", value, {**ARMS, "plain-2": {"noise": "none", "tau": 2.0}}, questions=asked)
    for path in (tmp_path / "half" / "runs").glob("plain-2-seed*"):
        path.unlink()
    next((tmp_path / "half" / "runs").glob("noisy-seed3*")).unlink()
    failed = {"reason": "exit status 1", "log": ["a", "ValueError: why"]}
    (tmp_path / "half" / "failed").mkdir()
    planned = next(run for run in read_study(tmp_path / "half").runs if run.arm == "plain-2")
    planned.failure.write_text(json.dumps(failed))
    earlier = failed | {"reason": "under an earlier plan"}
    (tmp_path / "half" / "failed" / "plain-2-seed0-00000000.json").write_text(json.dumps(earlier))
    findings = read_findings(tmp_path / "half")
    assert list(metric_table(findings).rows[2]) == ["plain-2", "0", "-", *["-"] * 5]
    text = parsed(page_of(findings)).text
    assert "9 of 15 finished" in text
    assert "Not finished: noisy seed 3; plain-2 seeds 0, 1, 2, 3, 4." in text
    assert "exit status 1: ValueError: why" in text
    assert "under an earlier plan" not in text
    assert "Not answered: question 'late'" in text
    assert "over the 1 questions of 2 that can be answered" in text


def test_mixed_versions_are_refused_or_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def other_torch(row: dict[str, Any]) -> None:
        if (row["arm"], row["seed"]) == ("noisy", 3):
            row["versions"] = row["versions"] | {"torch": "2.11"}

    folder = small_study(tmp_path / "mixed", change=other_torch, questions=[question("planted", "noisy", "plain")])
    assert report.main([str(folder)]) == 2
    assert "torch: 2.13 (9 rows), 2.11 (1 rows)" in capsys.readouterr().err
    assert not (folder / "report.html").exists()
    assert report.main([str(folder), "--allow_mixed"]) == 0
    table = (folder / "table.md").read_text()
    assert "| noisy * | 5 |" in table
    assert "| plain | 5 |" in table
    assert "noisy seed 3 (torch) differ from most runs" in table
    assert "The rows are of mixed versions." in table


def test_search_is_shown(tmp_path: Path) -> None:
    search = {"grid": {"tau": [1.0, 2.0]}, "seeds": [7], "settings": {"validation_file": "c.tsv"}}
    small_study(tmp_path / "known", search=search)
    assert "not there (search/chosen.json)" in page_of(read_findings(tmp_path / "known"))
    means = [{"choice": {"tau": 1.0}, "mean": 0.5}, {"choice": {"tau": 2.0}, "mean": None}]
    arms = {"plain": {"chosen": {"tau": 1.0}, "complete": False, "means": means}}
    content = {"metric": "accuracy", "better": "higher", "mode": "noise_off", "seeds": [7], "arms": arms}
    (tmp_path / "known" / "search").mkdir()
    (tmp_path / "known" / "search" / "chosen.json").write_text(json.dumps(content))
    table = search_table(read_findings(tmp_path / "known"))
    assert table is not None
    assert (list(table.heads), list(table.rows[0])) == (["arm", "tau 1", "tau 2"], ["plain", "**0.5000**", "-"])
    tried = read_study(tmp_path / "known").search.runs  # type: ignore[union-attr]  # it has one
    failed = next(run.failure for run in tried if (run.arm, run.choice) == ("plain", (("tau", 2.0),)))
    failed.parent.mkdir()
    failed.write_text(json.dumps({"reason": "exit status 1"}))
    table = search_table(read_findings(tmp_path / "known"))
    assert table is not None
    assert list(table.rows[0])[2] == "failed"


def test_texts_of_a_study_are_no_markup(tmp_path: Path) -> None:
    asked = [question("planted", "noisy", "plain") | {"text": "<b>Is it | & better?"}]
    folder = small_study(tmp_path / "odd", title="a < b & <script>", questions=asked)
    text = page_of(read_findings(folder), "make <it>")
    assert "<script" not in text
    assert "a < b & <script>" in parsed(text).text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of the two"),
        (["here", "--claims", "there"], "one of the two"),
        (["here", "--check"], "--check belongs to --claims"),
        (["--claims", "there", "--allow_mixed"], "goes with --check only"),
    ],
)
def test_options_that_do_not_go_together(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(argv) == 2
    assert message in capsys.readouterr().err


def test_table_of_a_study_that_has_just_begun(tmp_path: Path) -> None:
    study = make_study(tmp_path / "new", value, ARMS, questions=[question("planted", "noisy", "plain")])
    for path in (tmp_path / "new" / "runs").glob("noisy-*"):
        path.unlink()
    assert "| noisy | 0 | - |" in write_table(study)
    assert "No run has finished yet" not in (tmp_path / "new" / "table.md").read_text()
    for path in (tmp_path / "new" / "runs").iterdir():
        path.unlink()
    assert "No run has finished yet" in write_table(study)
    text = (tmp_path / "new" / "table.md").read_text()
    assert "Not answered: question 'planted'" in text
    assert "Made by `python training/report.py new`" in text


def test_the_probe_is_a_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = small_study(tmp_path / "known"), tmp_path / "page.html"
    assert report.main([str(folder), str(PROBE), "--output", str(output)]) == 0
    found = parsed(output.read_text())
    assert "Escape from an early choice" in found.text
    assert "trap 1: best share with temperature alone" in found.text
    assert "python training/local_minimum.py" in found.text
    assert sum(link.startswith("data:") for link in found.references) == 4
    assert "Escape" not in (tmp_path / "table.md").read_text()
    probe = tmp_path / "probe"
    probe.mkdir()
    (probe / "local_minimum.json").write_text("{}")
    assert report.main([str(probe), "--output", str(output)]) == 2
    assert "not what training/local_minimum.py writes" in capsys.readouterr().err
    assert report.main([str(probe)]) == 2
    assert "pass --output elsewhere" in capsys.readouterr().err


def test_questions_of_several_studies_stand_side_by_side(tmp_path: Path) -> None:
    asked = [question("shared", "noisy", "plain"), question("own", "plain", "noisy")]
    folders = [
        str(small_study(tmp_path / "first", questions=asked[:1])),
        str(small_study(tmp_path / "second", questions=asked)),
        str(small_study(tmp_path / "alone", questions=[question("other", "noisy", "plain")])),
    ]
    output = tmp_path / "page.html"
    assert report.main([*folders, "--output", str(output)]) == 0
    found = output.read_text()
    assert "The same questions in several studies" in parsed(found).text
    assert "first: accuracy, higher is better" in parsed(found).text
    assert "<strong>Better</strong> or <strong>worse</strong>: p at most" in found
    assert "**" not in parsed(found).text
    assert "alone: accuracy" not in parsed(found).text, "it asks what no other asks"
    assert "alone: accuracy" not in (tmp_path / "table.md").read_text()
    assert report.main([folders[0], folders[2], "--output", str(output)]) == 0
    assert "in several studies" not in output.read_text()


def test_folders_without_a_study_or_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "not the folder of a study: it has no study.yaml" in capsys.readouterr().err
    folder = small_study(tmp_path / "empty")
    for path in (folder / "runs").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="no finished run of its study yet \\(10 are planned\\)"):
        read_findings(folder)
    assert report.main([str(folder)]) == 2
    assert not (folder / "report.html").exists()
