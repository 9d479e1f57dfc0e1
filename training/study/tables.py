"""The tables of a study, in Markdown and as cells for the page."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.errors import UsageError
from harness.results import write_atomically
from study.findings import Arm, Estimate, Findings, estimate, findings_of, metric_words, mode_words
from study.plan import Study, choice_words
from study.rows import read_rows
from study.statistics import pair, student_interval
from study.verdicts import Verdict, direction, probability
from study.yaml_file import yaml_text

TABLE_FILE = "table.md"
NOTHING = "-"
MARK = " *"
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells, and a note below them; the first ``text_columns`` columns are text, the others numbers."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text_columns: int = 1

    def markdown(self) -> str:
        """The table in Markdown, its note below."""
        rule = ["---"] * self.text_columns + ["---:"] * (len(self.heads) - self.text_columns)
        lines = [f"| {' | '.join(map(_escaped, cells))} |" for cells in (self.heads, rule, *self.rows)]
        return "\n".join([*lines, "", self.note] if self.note else lines)


def metric_table(findings: Findings, metric: str | None = None) -> Table:
    """Arms by evaluation modes, of the study's metric unless another is named."""
    metric = metric or findings.study.metric
    heads = ["arm", "seeds", *(f"{metric_words(metric)}, {mode_words(mode)}" for mode in findings.modes)]
    rows = [
        [marked(arm), str(len(arm.rows)), *(_cell(arm.estimate(mode, metric)) for mode in findings.modes)]
        for arm in findings.arms
    ]
    better = direction(findings.study, metric)
    note = (
        f"Mean {metric_words(metric)} ({better} is better) at the last step over the seeds, ± half width of the 95 % "
        f"Student-t interval. {conditions(findings)}"
    )
    return Table(heads, rows, note)


def other_metrics_table(findings: Findings) -> Table | None:
    """Arms by the other metrics, in the main mode; None if there are none."""
    names = [name for name in findings.metrics[1:] if any(arm.values(findings.mode, name) for arm in findings.arms)]
    if not names:
        return None
    rows = [[marked(arm), *(_cell(arm.estimate(findings.mode, name)) for name in names)] for arm in findings.arms]
    note = (
        f"In the mode {mode_words(findings.mode)}, at the last step; mean and 95 % Student-t interval over the seeds."
    )
    return Table(["arm", *map(metric_words, names)], rows, note)


def difference_table(findings: Findings) -> Table | None:
    """Every arm minus the reference, paired by seed; None without a reference or a seed pair."""
    study = findings.study
    if study.reference is None:
        return None
    reference = findings.arm(study.reference)
    others = [arm for arm in findings.arms if arm.name != study.reference]
    rows = [
        [marked(arm), *(_difference(arm, reference, mode, study.metric) for mode in findings.modes)] for arm in others
    ]
    if all(cell == NOTHING for row in rows for cell in row[1:]):
        return None
    note = (
        f"Arm minus {study.reference} in {metric_words(study.metric)}, mean over the seeds both have, ± half width "
        "of the 95 % Student-t interval of the paired differences, each on its own: the answers to the questions "
        "are corrected for their number, these intervals are not."
    )
    return Table(["arm", *(mode_words(mode) for mode in findings.modes)], rows, note)


def verdict_table(findings: Findings) -> Table | None:
    """The numbers behind the verdicts; None if there are none."""
    if not findings.verdicts:
        return None
    heads = [
        *("question", "outcome", "difference", "95 % t-interval", "95 % bootstrap", "p", "corrected p", "sign-flip p"),
        *("effect size", "seeds", "could be seen"),
    ]
    note = (
        "Difference: compared minus against, paired by seed. p: paired t-test; corrected: by Holm over "
        f"{len(findings.verdicts)} question{'s' if len(findings.verdicts) > 1 else ''}; sign-flip p: of the "
        "permutation test, which cannot go below 2 / 2^seeds. The bootstrap interval is too short with few seeds. "
        "Effect size: Cohen's d_z with Hedges' correction. Could be seen: the smallest difference that would have "
        "been found with 80 % probability."
    )
    return Table(heads, [_verdict_row(verdict) for verdict in findings.verdicts], note, text_columns=2)


def arms_table(findings: Findings) -> Table:
    """What the arms are: their differences from the base, and what the search chose for them."""
    study = findings.study
    keys = dict.fromkeys(key for arm in study.arms.values() for key in arm)
    chosen = list(dict.fromkeys(key for values in study.chosen.values() for key in values))
    heads = ["arm", *keys, *(f"{key} (searched)" for key in chosen)]
    rows = []
    for name, differences in study.arms.items():
        own = [yaml_text(differences[key]) if key in differences else "" for key in keys]
        searched = [yaml_text(study.chosen.get(name, {}).get(key, "")) for key in chosen]
        rows.append([name, *own, *searched])
    return Table(heads, rows, "Settings that differ from the base; an empty cell is the base's.")


def cost_table(findings: Findings) -> Table | None:
    """Seconds per step, peak memory and time of a run, by arm; None if no run says them."""
    rows = []
    for arm in findings.arms:
        seconds, memory = step_seconds(arm), peak_memory(arm)
        total = [row.seconds for row in arm.rows]
        cells = [
            f"{_mean(values):{form}}" if values else NOTHING for values, form in ((seconds, ".4g"), (memory, ".0f"))
        ]
        rows.append([marked(arm), *cells, f"{_mean(total):.1f}" if total else NOTHING])
    if all(set(row[1:]) == {NOTHING} for row in rows):
        return None
    heads = ["arm", "training, s per step", "peak memory, MiB", "whole run, s"]
    note = "Means over the seeds. Times are those of this machine with what else ran on it: for orientation only."
    return Table(heads, rows, note)


def search_table(findings: Findings) -> Table | None:
    """The means of the search by arm and choice, the chosen one in bold; None without a search's results."""
    search = findings.search
    if search is None:
        return None
    arms: Mapping[str, Any] = search["arms"]
    choices = list(dict.fromkeys(choice_words(tried["choice"]) for arm in arms.values() for tried in arm["means"]))
    searched = findings.study.search.runs if findings.study.search else ()
    rows = []
    for name, arm in arms.items():
        means = {choice_words(tried["choice"]): tried["mean"] for tried in arm["means"]}
        best = None if arm["chosen"] is None else choice_words(arm["chosen"])
        ended_badly = {
            choice_words(dict(run.choice)) for run in searched if run.arm == name and run.id in findings.failed
        }
        rows.append(
            [name, *(_searched(means.get(choice), choice == best, choice in ended_badly) for choice in choices)]
        )
    note = (
        f"Mean {metric_words(search['metric'])} ({search['better']} is better, {mode_words(search['mode'])}) over the "
        f"seeds {words(search['seeds'])} of the search, on other evaluation data than the study's. Bold: chosen."
    )
    return Table(["arm", *choices], rows, note)


def conditions(findings: Findings) -> str:
    """Seeds, runs, hours, device, versions and commit in a sentence or two."""
    rows = findings.rows
    if not rows:
        return "No run has finished yet."
    hours = math.fsum(row.seconds for row in rows) / 3600
    seeds = sorted({row.seed for row in rows})
    text = (
        f"Seed{'s' if len(seeds) > 1 else ''} {words(seeds)}; {len(rows)} run{'s' if len(rows) > 1 else ''}, "
        f"{hours:.2g} hours in all, {each(row.device for row in rows)}; "
        f"{', '.join(f'{name} {each(values)}' for name, values in _versions(findings).items())}; "
        f"commit {each(_commit(row.commit, row.dirty) for row in rows)}."
    )
    text += not_finished(findings)
    mixed = [f"{row.arm} seed {row.seed} ({words(row.differs)})" for row in rows if row.differs]
    return f"{text} Mixed versions are marked *: {words(mixed)} differ from most runs." if mixed else text


def not_finished(findings: Findings) -> str:
    """A sentence with a space before it, or nothing where all runs are there."""
    arms = [f"{arm} seed{'s' if len(seeds) > 1 else ''} {words(seeds)}" for arm, seeds in findings.missing.items()]
    return f" Not finished: {'; '.join(arms)}." if arms else ""


def verdict_lines(findings: Findings) -> list[tuple[str, str]]:
    """(question, answer) of every question, also of those that cannot be answered."""
    sentences = {verdict.question.id: verdict.sentence for verdict in findings.verdicts}
    return [
        (question.text, sentences.get(question.id) or f"Not answered: {findings.unanswered[question.id]}")
        for question in findings.study.questions
    ]


def correction_note(findings: Findings) -> str:
    """What the correction leaves out, if some questions have no answer yet; else empty."""
    if not findings.unanswered or not findings.verdicts:
        return ""
    total = len(findings.study.questions)
    return (
        f"Corrected over the {len(findings.verdicts)} questions of {total} that can be answered; with the others the "
        "corrected p will rise."
    )


def markdown_report(reports: Sequence[Findings], command: str) -> str:
    """The table for the README: of each study the verdicts and the tables of its metric."""
    parts = []
    for findings in reports:
        lines = [f"- **{question}** {answer}" for question, answer in verdict_lines(findings)]
        lines += [correction_note(findings)] if correction_note(findings) else []
        tables = [metric_table(findings), difference_table(findings)]
        parts += [f"# {findings.study.title}", "\n".join(lines), *(table.markdown() for table in tables if table)]
    parts.append(f"Made by `{command}`.")
    return "\n\n".join(part for part in parts if part) + "\n"


def write_table(study: Study) -> str:
    """Writes table.md into the folder of a study from the runs finished so far; returns the table of its metric."""
    findings = findings_of(study, read_rows(study.output_dir, allow_mixed=True))
    command = shlex.join(["python", "training/report.py", findings.shown])
    write_atomically(study.output_dir / TABLE_FILE, markdown_report([findings], command))
    return metric_table(findings).markdown()


def step_seconds(arm: Arm) -> list[float]:
    """Training time per step of each run that says it."""
    return [row.content["train_seconds"] / row.content["steps"] for row in arm.rows if row.content.get("steps")]


def peak_memory(arm: Arm) -> list[float]:
    """Peak memory of each run that says it, MiB."""
    return [row.content["peak_memory_bytes"] / MIB for row in arm.rows if row.content.get("peak_memory_bytes")]


def marked(arm: Arm) -> str:
    """The arm's name, with a mark if its runs are of mixed versions."""
    return arm.name + MARK if arm.mixed else arm.name


def words(items: Iterable[object]) -> str:
    """``a, b, c``."""
    return ", ".join(map(str, items))


def each(values: Iterable[str | None]) -> str:
    """The value, or all of them with how often they are there."""
    counts: dict[str | None, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count} runs)" for value, count in counts.items())


def _versions(findings: Findings) -> dict[str, list[str | None]]:
    return {name: [row.versions.get(name) for row in findings.rows] for name in ("torch", "gumbel_attention")}


def _commit(commit: str | None, dirty: bool) -> str:
    return "unknown" if commit is None else commit[:8] + (" with changes" if dirty else "")


def _cell(found: Estimate | None) -> str:
    return NOTHING if found is None else str(found)


def _difference(arm: Arm, reference: Arm, mode: str, metric: str) -> str:
    first, second = arm.values(mode, metric), reference.values(mode, metric)
    try:
        differences = pair(first, second).differences
    except UsageError:
        shared = sorted(first.keys() & second.keys())
        return f"{estimate([first[seed] - second[seed] for seed in shared]).mean:+.4f}" if shared else NOTHING
    found = student_interval(differences)
    return f"{differences.mean():+.4f} ± {(found.high - found.low) / 2:.4f}"


def _verdict_row(verdict: Verdict) -> list[str]:
    found = verdict.comparison
    effect = found.corrected_effect_size
    visible = verdict.smallest_visible
    return [
        verdict.question.id,
        verdict.outcome,
        f"{found.mean:+.4f}",
        f"{found.student.low:+.4f} to {found.student.high:+.4f}",
        f"{found.bootstrap.low:+.4f} to {found.bootstrap.high:+.4f}",
        probability(found.p).removeprefix("= "),
        probability(verdict.corrected_p).removeprefix("= "),
        probability(found.sign_flip_p).removeprefix("= "),
        NOTHING if effect is None else f"{effect:+.2f}",
        str(found.pairs),
        NOTHING if visible is None else f"{visible:.2g}",
    ]


def _searched(mean: float | None, best: bool, failed: bool) -> str:
    if mean is None:
        return "failed" if failed else NOTHING
    return f"**{mean:.4f}**" if best else f"{mean:.4f}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
