"""The answers of several studies side by side: a row for each question, a column for each study."""

from __future__ import annotations

from collections.abc import Sequence

from study.findings import Findings, metric_words
from study.statistics import POWER
from study.tables import NOTHING, Table
from study.verdicts import Verdict, direction

TITLE = "The same questions in several studies"


def overview_table(reports: Sequence[Findings], asked_by: int = 2) -> Table | None:
    """Questions by the studies that ask one of them; None if no question is asked by so many of the studies.

    A question is known by its id; its text is that of the first study that asks it.
    """
    texts: dict[str, str] = {}
    asked: dict[str, int] = {}
    for findings in reports:
        for question in findings.study.questions:
            texts.setdefault(question.id, question.text)
            asked[question.id] = asked.get(question.id, 0) + 1
    shared = [name for name in texts if asked[name] >= asked_by]
    if not shared:
        return None
    asking = [findings for findings in reports if any(one.id in shared for one in findings.study.questions)]
    rows = [[texts[name], *(_cell(findings, name) for findings in asking)] for name in shared]
    return Table(["question", *map(_head, asking)], rows, _note(asking))


def _head(findings: Findings) -> str:
    metric = findings.study.metric
    return f"{findings.name}: {metric_words(metric)}, {direction(findings.study, metric)} is better"


def _cell(findings: Findings, name: str) -> str:
    found = next((verdict for verdict in findings.verdicts if verdict.question.id == name), None)
    if found is not None:
        return _words(found)
    return "not answered" if name in findings.unanswered else NOTHING


def _words(verdict: Verdict) -> str:
    """``+0.012 (-0.01 to +0.034)``, with the outcome before it if a difference was found."""
    interval = verdict.comparison.student
    numbers = f"{verdict.comparison.mean:+.3g} ({interval.low:+.2g} to {interval.high:+.2g})"
    mark = "" if verdict.outcome == "no difference found" else f"**{verdict.outcome}** "
    return mark + numbers + (" *" if verdict.mixed else "")


def _note(reports: Sequence[Findings]) -> str:
    mixed = any(verdict.mixed for findings in reports for verdict in findings.verdicts)
    counts = sorted({verdict.comparison.pairs for findings in reports for verdict in findings.verdicts})
    return (
        "What the question names first minus what it compares it with: the mean of the differences paired by seed and "
        f"its 95 % interval ({' or '.join(map(str, counts))} seeds). **Better** or **worse**: p at most 0.05 after "
        "Holm's correction over all questions of the study; all others: no difference found. What could have been "
        f"seen with {100 * POWER:.0f} % probability stands with each study."
        + (" * rows of mixed versions." if mixed else "")
    )
