"""Collects what the tests found of each architecture, prints the sum and writes the table."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

REACH = "test_every_softmax_over_tokens_is_ours"


@dataclasses.dataclass
class Found:
    """What the tests found of one architecture."""

    outcomes: dict[str, str] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def has_softmax(self) -> bool:
        """Whether the unpatched model computes a softmax over tokens."""
        return bool(self.facts.get("attention"))

    @property
    def reached(self) -> bool:
        """Whether all of its softmaxes over tokens are the library's."""
        return self.has_softmax and self.outcomes.get(REACH) == "passed"

    @property
    def way(self) -> str:
        """How it is reached."""
        return " and ".join(self.facts.get("ways", [])) or ("refused" if self.has_softmax else "no softmax")


class Recorder:
    """A pytest plugin that listens to the tests of architectures."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.found: dict[str, Found] = collections.defaultdict(Found)
        self.others: dict[str, Found] = collections.defaultdict(Found)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes down a phase of a test."""
        facts = dict(report.user_properties)
        if "architecture" in facts:
            found = self.found[facts["architecture"]]
        elif "other" in facts:
            found = self.others[facts["other"]]
        else:
            return
        found.seconds += report.duration
        if report.when == "call" or report.outcome != "passed":
            check = report.location[2].split("[")[0]
            found.outcomes[check] = report.outcome
            found.facts |= facts
            if getattr(report, "wasxfail", None):
                found.reasons[check] = report.wasxfail.removeprefix("reason: ")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Prints the sum, and writes the table where one was asked for."""
        if not self.found and not self.others:
            return
        terminalreporter.section("architectures")
        for line in [*(summary(self.found.values()) if self.found else []), *other_summary(self.others)]:
            terminalreporter.write_line(line)
        path = self.config.getoption("--support-table", default=None)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(table(self.found, self.others), encoding="utf-8")
            terminalreporter.write_line(f"table: {path}")


def summary(found: Iterable[Found]) -> list[str]:
    """How many are reached, and by which way."""
    every = list(found)
    softmax = [one for one in every if one.has_softmax]
    ways = collections.Counter(one.way for one in softmax if one.reached)
    return [
        f"{sum(one.reached for one in softmax)} reached of {len(softmax)} with softmax attention: "
        + ", ".join(f"{count} by {way}" for way, count in sorted(ways.items())),
        f"{len(every) - len(softmax)} have no softmax over tokens; {sum(one.seconds for one in every):.0f} s",
    ]


def other_summary(others: dict[str, Found]) -> list[str]:
    """How many of the other modalities are patched, and how many of these were run and equal eager."""
    lines = []
    built = {name: one for name, one in others.items() if "modality" in one.facts}
    for modality in sorted({one.facts["modality"] for one in built.values()}):
        every = [one for one in built.values() if one.facts["modality"] == modality]
        patched = [one for one in every if "ways" in one.facts]
        run = [one for one in patched if "difference" in one.facts]
        good = sum("passed" in one.outcomes.values() for one in run)
        missing = sum("skipped" in one.outcomes.values() for one in every)
        lines.append(
            f"{modality}: {len(every)} architectures, {missing} without a tiny configuration, {len(patched)} patched, "
            f"{len(every) - missing - len(patched)} refused; {good} of {len(run)} that were run equal eager"
        )
    return lines


def _other_rows(others: dict[str, Found]) -> list[str]:
    rows = ["| model type | modality | way | attention modules | equals eager |", "|---|---|---|---|---|"]
    for name, one in sorted(others.items()):
        outcome = next(iter(one.outcomes.values()), "")
        way = " and ".join(one.facts.get("ways", [])) or ("not built" if outcome == "skipped" else "refused")
        equal = ("yes" if outcome == "passed" else "no") if "difference" in one.facts else "not run"
        cells = (name, one.facts.get("modality", ""), way, one.facts.get("layers", ""), equal)
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return rows


def table(found: dict[str, Found], others: dict[str, Found]) -> str:
    """The support table in Markdown: of text architectures, of the other modalities, or of both."""
    head = [
        "# Architectures under patch_model",
        "",
        f"transformers {hf.__version__}, torch {torch.__version__}. Written by "
        f"`make test-{'models' if found else 'modalities'}`.",
        "",
    ]
    text = _text_part(found) if found else []
    rest = ["", *(f"- {line}" for line in other_summary(others)), "", *_other_rows(others)] if others else []
    return "\n".join([*head, *text, *rest]) + "\n"


def _text_part(found: dict[str, Found]) -> list[str]:
    notes: list[str] = []
    rows = [
        "| model type | attention modules | way | reached | checks passed | exceptions |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in sorted(found.items()):
        passed = sum(outcome == "passed" for outcome in one.outcomes.values())
        run = passed + sum(outcome == "failed" or check in one.reasons for check, outcome in one.outcomes.items())
        wrong = [check for check, outcome in one.outcomes.items() if outcome == "failed"]
        remarks = [*(f"{check}: failed" for check in wrong)]
        for reason in one.reasons.values():
            if reason not in notes:
                notes.append(reason)
            remarks.append(f"[{notes.index(reason) + 1}]")
        reached = "yes" if one.reached else "no" if one.has_softmax else "-"
        cells = (
            name,
            one.facts.get("attention", 0),
            one.way,
            reached,
            f"{passed} of {run}",
            " ".join(sorted(set(remarks))),
        )
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    head = [*(f"{line}." for line in summary(found.values())[:1]), ""]
    return [*head, *rows, "", *(f"[{number}] {note}  " for number, note in enumerate(notes, 1))]
