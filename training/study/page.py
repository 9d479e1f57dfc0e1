"""One self-contained HTML page of one or more studies: no file beside it and no address outside it is needed."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from study.figures import Plot
from study.findings import Findings, metric_words, mode_words
from study.overview import TITLE, overview_table
from study.probe import Probe
from study.tables import (
    Table,
    arms_table,
    correction_note,
    cost_table,
    difference_table,
    each,
    metric_table,
    not_finished,
    other_metrics_table,
    search_table,
    verdict_lines,
    verdict_table,
    words,
)
from study.yaml_file import yaml_text

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 66rem; margin: 0 auto;
  padding: 1rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { border-top: 2px solid #111; padding-top: 1rem; margin-top: 3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.8rem; margin: 0.5rem 0; }
th, td { padding: 0.2rem 0.4rem; border-bottom: 1px solid #bbb; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #111; vertical-align: bottom; white-space: normal; }
.text { text-align: left; }
td.text { white-space: normal; min-width: 9rem; }
.overview td { white-space: normal; }
.note, figcaption { font-size: 0.85rem; color: #333; max-width: 56rem; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
dt { font-weight: 600; margin-top: 0.6rem; }
dd { margin-left: 1.2rem; }
.outcome { border: 1px solid #111; padding: 0 0.4rem; white-space: nowrap; }
@media print { body { max-width: none; } figure, table { break-inside: avoid; } }
"""


def page(reports: Sequence[tuple[Findings, Sequence[Plot]] | Probe], command: str) -> str:
    """The page.

    Args:
        reports: the studies and their plots, and probes, in their order.
        command: that made it; every figure carries it.
    """
    titles = [report.title if isinstance(report, Probe) else report[0].study.title for report in reports]
    title = titles[0] if len(titles) == 1 else "Studies"
    parts = [f"<h1>{escape(title)}</h1>"]
    if len(titles) > 1:
        links = (f'<li><a href="#{_anchor(index)}">{escape(text)}</a></li>' for index, text in enumerate(titles))
        parts.append(f"<ul>{''.join(links)}</ul>")
        overview = overview_table([report[0] for report in reports if not isinstance(report, Probe)])
        if overview is not None:
            parts.append(f"<h2>{TITLE}</h2>\n<div class='overview'>{_table(overview)}</div>")
    for index, report in enumerate(reports):
        head = f"<h2>{escape(titles[index])}</h2>" if len(titles) > 1 else ""
        if isinstance(report, Probe):
            parts.append(_probe(report, head, _anchor(index), command))
        else:
            parts.append(_section(*report, head, _anchor(index), command))
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"<head>{meta}<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>"
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<body>\n{body}\n</body>\n</html>\n'


def study_command(findings: Findings) -> str:
    """The command that repeats a study from its folder."""
    return f"python training/ablate.py --config {findings.shown}/study.yaml --output_dir runs/{findings.name}"


def _anchor(index: int) -> str:
    return f"study-{index + 1}"


def _section(findings: Findings, drawn: Sequence[Plot], head: str, anchor: str, command: str) -> str:
    study = findings.study
    tables = (
        (metric_words(study.metric).capitalize(), metric_table(findings)),
        (f"Against {study.reference}", difference_table(findings)),
        ("Other metrics", other_metrics_table(findings)),
    )
    parts = [f'<section id="{anchor}">', head, _verdicts(findings)]
    parts += [f"<h3>{escape(title)}</h3>\n{_table(table)}" for title, table in tables if table is not None]
    parts += [_plot(plot, study_command(findings), anchor, command) for plot in drawn]
    parts += ["<h3>What was run</h3>", _what_was_run(findings), "</section>"]
    return "\n".join(parts)


def _probe(probe: Probe, head: str, anchor: str, command: str) -> str:
    sentences = "".join(f"<li>{_bold(escape(sentence))}</li>" for sentence in probe.sentences)
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in probe.facts.items())
    facts = f"<dl><dt>Command</dt><dd><code>{escape(probe.command)}</code></dd>{facts}</dl>"
    drawn = [_plot(plot, probe.command, anchor, command) for plot in probe.plots]
    parts = [f'<section id="{anchor}">', head, f"<ul>{sentences}</ul>", *drawn, "<h3>What was run</h3>", facts]
    return "\n".join([*parts, "</section>"])


def _verdicts(findings: Findings) -> str:
    if not findings.study.questions:
        return "<p>The study asks no question; its tables and plots test nothing.</p>"
    outcomes = {verdict.question.text: verdict.outcome for verdict in findings.verdicts}
    items = "".join(
        f"<dt>{escape(question)} <span class='outcome'>{outcomes.get(question, 'not answered')}</span></dt>"
        f"<dd>{escape(answer)}</dd>"
        for question, answer in verdict_lines(findings)
    )
    table, note = verdict_table(findings), correction_note(findings)
    more = f"<p class='note'>{escape(note)}</p>" if note else ""
    return f"<h3>Questions</h3>\n<dl>{items}</dl>{more}\n{_table(table) if table is not None else ''}"


def _plot(plot: Plot, ran: str, anchor: str, command: str) -> str:
    title = f"<h3>{escape(plot.title)}</h3>"
    if plot.figure is None:
        return f"{title}\n<p>{escape(plot.caption)}</p>"
    data = base64.b64encode(plot.image).decode()
    width = round(plot.figure.get_figwidth() * 96)
    caption = (
        f"{escape(plot.caption)}<br>Command: <code>{escape(command)}</code>, from the runs of "
        f"<code>{escape(ran)}</code>."
    )
    image = f'<img width="{width}" alt="{escape(plot.title)}" src="data:image/png;base64,{data}">'
    return f'{title}\n<figure id="{anchor}-{plot.id}">{image}<figcaption>{caption}</figcaption></figure>'


def _what_was_run(findings: Findings) -> str:
    study, rows = findings.study, findings.rows
    facts = {
        "Command": f"<code>{escape(study_command(findings))}</code>",
        "A run of it": f"<code>{escape(rows[0].content['command'])}</code>",
        "Runs": escape(_runs(findings)),
        "Seeds": escape(
            f"{words(study.seeds)}. For a seed, arms share initialisation and data order, but not all dropout masks."
        ),
        "Evaluation": escape(f"{words(map(mode_words, findings.modes))}, from the same weights, at the last step."),
        "Device": escape(each(f"{row.device}, {_processes(row.content)}" for row in rows)),
        "Versions": escape(_versions(findings)),
        "Commit": escape(each(_commit(row.commit, row.dirty) for row in rows)),
    }
    if findings.failed:
        facts["Failed runs"] = escape("; ".join(f"{name}: {message}" for name, message in findings.failed.items()))
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items())
    base = "".join(
        f"<li><code>{escape(key)}: {escape(yaml_text(value))}</code></li>" for key, value in study.base.items()
    )
    parts = [f"<dl>{items}</dl>", "<h3>Arms</h3>", _table(arms_table(findings))]
    parts.append(f"<details><summary>Settings of all arms</summary><ul>{base}</ul></details>")
    search, cost = search_table(findings), cost_table(findings)
    if search is not None:
        parts += ["<h3>Search</h3>", _table(search)]
    elif study.search is not None:
        parts.append("<p>What the search chose is not there (search/chosen.json).</p>")
    return "\n".join([*parts, "<h3>Cost in figures</h3>", _table(cost)] if cost is not None else parts)


def _runs(findings: Findings) -> str:
    done, planned = len(findings.rows), len(findings.study.runs)
    hours = sum(row.seconds for row in findings.rows) / 3600
    return f"{done} of {planned} finished, {hours:.2g} hours in all.{not_finished(findings)}"


def _versions(findings: Findings) -> str:
    names = dict.fromkeys(name for row in findings.rows for name in row.versions)
    return words(f"{name} {each(row.versions.get(name) for row in findings.rows)}" for name in names)


def _commit(commit: str | None, dirty: bool) -> str:
    return "unknown" if commit is None else commit + (" with local changes" if dirty else "")


def _processes(content: Mapping[str, Any]) -> str:
    processes, threads = content.get("num_processes", 1), content.get("num_threads")
    text = f"{processes} process{'es' if processes > 1 else ''}"
    return text if threads is None else f"{text} of {threads} thread{'s' if threads > 1 else ''}"


def _table(table: Table) -> str:
    heads = _cells(table.heads, table.text_columns, "th")
    rows = "".join(f"<tr>{_cells(row, table.text_columns, 'td')}</tr>\n" for row in table.rows)
    note = f"<p class='note'>{_bold(escape(table.note))}</p>" if table.note else ""
    return f"<div class='scroll'><table><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>{note}"


def _cells(cells: Sequence[str], text_columns: int, tag: str) -> str:
    return "".join(
        f"<{tag}{' class=' + json.dumps('text') if index < text_columns else ''}>{_bold(escape(cell))}</{tag}>"
        for index, cell in enumerate(cells)
    )


def _bold(text: str) -> str:
    """Markdown's bold and code."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
