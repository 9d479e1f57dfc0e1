"""Claims in a Markdown file that come from results: blocks between markers, and whether they still agree.

    <!-- claims:NAME -->
    (what the study in results/NAME says; written by report.py, do not edit)
    <!-- /claims -->

``results`` lies beside the file. ``<!-- claims:overview NAME NAME ... -->`` holds the answers of several studies side
by side, to questions that two of them ask; of one study, all its answers. ``allow_mixed`` after the names takes runs
of mixed versions and marks them.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UsageError
from harness.results import write_atomically
from study.findings import Findings, metric_words, read_findings
from study.overview import overview_table
from study.tables import correction_note, metric_table, verdict_lines, words

RESULTS_FOLDER = "results"
OVERVIEW = "overview"
_MIXED = "allow_mixed"
_OPEN = re.compile(r"^<!-- claims:(?P<words>[\w.-]+(?: [\w.-]+)*) -->\n", re.MULTILINE)
_CLOSE = "<!-- /claims -->"
_ANY_OPEN = "<!-- claims:"
_GLUE = "\x1a"


@dataclasses.dataclass(frozen=True)
class Block:
    """The claims of one study, or of several, in a file.

    Attributes:
        name: folder below ``results``, or ``overview``.
        studies: of an overview, the folders.
        allow_mixed: whether runs of mixed versions are taken.
        start: where its text begins in the file.
        end: where it ends.
        text: what stands there.
    """

    name: str
    studies: tuple[str, ...]
    allow_mixed: bool
    start: int
    end: int
    text: str


def read_blocks(path: Path) -> list[Block]:
    """The blocks of a file, in their order.

    Raises:
        UsageError: the file cannot be read, or a marker is malformed, or without its other one.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}.") from error
    blocks: list[Block] = []
    for found in _OPEN.finditer(content):
        end = content.find(_CLOSE, found.end())
        if end < 0 or _ANY_OPEN in content[found.end() : end]:
            raise UsageError(f"{path}: the block claims:{found['words']} has no {_CLOSE!r} after it.")
        name, *more = found["words"].split(" ")
        studies = tuple(word for word in more if word != _MIXED)
        if (name == OVERVIEW) != bool(studies):
            raise UsageError(
                f"{path}: expected '<!-- claims:NAME -->' of one study, or '<!-- claims:{OVERVIEW} NAME NAME -->' of "
                f"several, each with or without {_MIXED}; got {found[0].strip()!r}."
            )
        blocks.append(Block(name, studies, _MIXED in more, found.end(), end, content[found.end() : end]))
    if content.count(_ANY_OPEN) != len(blocks) or content.count(_CLOSE) != len(blocks):
        raise UsageError(
            f"{path}: {content.count(_ANY_OPEN)} markers open claims, {content.count(_CLOSE)} close them, and "
            f"{len(blocks)} are pairs. Expected '<!-- claims:NAME -->' alone in a line, the text, and {_CLOSE!r}."
        )
    return blocks


def claims_text(findings: Findings) -> str:
    """What a block holds: the table with its conditions, then the answers to the study's questions."""
    table = metric_table(findings)
    answers = [_wrapped(f"- **{question}** {answer}", "  ") for question, answer in verdict_lines(findings)]
    parts = [dataclasses.replace(table, note="").markdown(), _wrapped(table.note), "\n".join(answers)]
    parts.append(_wrapped(correction_note(findings)))
    if not findings.study.questions:
        parts.append(f"The study asks no question: its {metric_words(findings.study.metric)} is not tested.")
    return "\n" + "\n\n".join(part for part in parts if part) + "\n\n"


def drifted(path: Path) -> list[str]:
    """The names of the blocks that differ from what the results say now.

    Raises:
        UsageError: as :func:`read_blocks`, or a study cannot be read.
    """
    return [block.name for block in read_blocks(path) if block.text != _text_of(path, block)]


def update(path: Path) -> list[str]:
    """Writes what the results say now into the blocks of a file; returns the names of those that changed.

    Raises:
        UsageError: as :func:`drifted`, or there is no block.
    """
    blocks = read_blocks(path)
    if not blocks:
        raise UsageError(f"{path} has no block '<!-- claims:NAME -->' ... {_CLOSE!r} to write into.")
    content, changed = path.read_text(encoding="utf-8"), []
    for block in reversed(blocks):
        text = _text_of(path, block)
        if text != block.text:
            content = content[: block.start] + text + content[block.end :]
            changed.append(block.name)
    if changed:
        write_atomically(path, content)
    return changed[::-1]


def _wrapped(text: str, indent: str = "") -> str:
    """Lines of at most 119 columns; none begins with the number of ``p = 1.``, which would begin a list."""
    glued = re.sub(r"p ([=<]) ", rf"p{_GLUE}\1{_GLUE}", text)
    filled = textwrap.fill(glued, 119, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return filled.replace(_GLUE, " ")


def overview_text(reports: Sequence[Findings]) -> str:
    """What a block on one study or several holds: the table of their answers, without the arms.

    Raises:
        UsageError: no question is asked by two of them, or by the only one, or one of them asks none of these.
    """
    table = overview_table(reports, asked_by=min(2, len(reports)))
    if table is None:
        names = ", ".join(findings.name for findings in reports)
        raise UsageError(f"no question is asked by {'two of ' if len(reports) > 1 else ''}{names}.")
    if len(table.heads) <= len(reports):
        raise UsageError(
            f"one of {words(findings.name for findings in reports)} asks no question of another: leave it out."
        )
    return f"\n{dataclasses.replace(table, note='').markdown()}\n\n{_wrapped(table.note)}\n\n"


def _text_of(path: Path, block: Block) -> str:
    results = path.parent / RESULTS_FOLDER
    try:
        if block.name == OVERVIEW:
            return overview_text([read_findings(results / name, block.allow_mixed) for name in block.studies])
        return claims_text(read_findings(results / block.name, block.allow_mixed))
    except UsageError as error:
        raise UsageError(f"{path}, claims:{block.name}: {error}") from error
