"""Reports studies: one self-contained HTML page and a Markdown table, from the studies' folders alone.

    python training/report.py results/sst2_minilm [MORE ...] [--output results/sst2_minilm/report.html]
        [--figures] [--allow_mixed]
    python training/report.py --claims README.md [--check]

A folder is the output_dir of training/ablate.py: study.yaml, runs/*.json and, of a search, search/chosen.json; that of
training/local_minimum.py becomes a section of the page, too. Beside the page, by default report.html in the first
folder, lie table.md and verdicts.json, which has every number behind the verdicts. ``--figures`` writes the plots of
the studies as PNG files too.

Runs of different versions, commits or devices are refused unless ``--allow_mixed`` is given; then they are marked.

``--claims`` writes what the studies in ``results`` say into the blocks of a Markdown file, each between the lines
``<!-- claims:NAME -->`` and ``<!-- /claims -->``, those of several side by side after
``<!-- claims:overview NAME NAME -->``; with ``--check`` it only compares: exit status 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UsageError
from harness.results import write_atomically
from study.claims import drifted, update
from study.figures import plots
from study.findings import Findings, read_findings
from study.overview import TITLE, overview_table
from study.page import page
from study.probe import Probe, is_probe, read_probe
from study.tables import TABLE_FILE, markdown_report

PAGE_FILE = "report.html"
VERDICTS_FILE = "verdicts.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report or the claims.

    Returns:
        Exit status: 0, 1 if claims drifted, 2 for a mistake in the arguments or the folders.
    """
    try:
        options = parse_options(argv)
        if options.claims is not None:
            return claim(Path(options.claims), options.check)
        output = Path(options.output or Path(options.folders[0]) / PAGE_FILE)
        if is_probe(output.parent):
            raise UsageError(f"table.md in {str(output.parent)!r} is that of the probe: pass --output elsewhere.")
        reports = [
            read_probe(folder) if is_probe(folder) else read_findings(folder, options.allow_mixed)
            for folder in options.folders
        ]
        write(reports, output, portable_command(options), options.figures)
    except UsageError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report.py: error: {error.filename} cannot be written: {error.strerror}.", file=sys.stderr)
        return 2
    print(f"{output} and {TABLE_FILE}, {VERDICTS_FILE} beside it")
    return 0


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        UsageError: neither folders nor ``--claims``, or options that do not go together.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="folder of a study")
    parser.add_argument("--output", metavar="FILE", help=f"the page; {PAGE_FILE} in the first folder unless given")
    parser.add_argument("--figures", action="store_true", help="write the plots as PNG files beside the page, too")
    parser.add_argument("--allow_mixed", action="store_true", help="take runs of mixed versions, and mark them")
    parser.add_argument("--claims", metavar="FILE", help="write what the results say into this Markdown file")
    parser.add_argument("--check", action="store_true", help="with --claims: compare only")
    options = parser.parse_args(argv)
    if bool(options.folders) == (options.claims is not None):
        raise UsageError("expected folders of studies, or --claims FILE, one of the two.")
    if options.claims is not None and (options.output or options.figures or options.allow_mixed):
        raise UsageError("--claims goes with --check only; a block says itself whether it takes mixed versions.")
    if options.check and options.claims is None:
        raise UsageError("--check belongs to --claims.")
    return options


def write(reports: Sequence[Findings | Probe], output: Path, command: str, figures: bool = False) -> None:
    """Writes the page and what lies beside it.

    Args:
        reports: the studies and probes.
        output: the page.
        command: that makes it.
        figures: whether to write PNG files, ``STUDY-FIGURE.png``, too.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    drawn = [item if isinstance(item, Probe) else (item, plots(item)) for item in reports]
    write_atomically(output, page(drawn, command))
    studies = [item for item in drawn if not isinstance(item, Probe)]
    overview = overview_table([item for item, _ in studies])
    text = "" if overview is None else f"# {TITLE}\n\n{overview.markdown()}\n\n"
    write_atomically(output.parent / TABLE_FILE, text + markdown_report([item for item, _ in studies], command))
    verdicts = {item.name: [verdict.to_dict() for verdict in item.verdicts] for item, _ in studies}
    write_atomically(output.parent / VERDICTS_FILE, json.dumps(verdicts, indent=1, allow_nan=False) + "\n")
    if figures:
        for item, own in studies:
            for plot in own:
                if plot.figure is not None:
                    (output.parent / f"{item.name}-{plot.id}.png").write_bytes(plot.image)


def claim(path: Path, check: bool) -> int:
    """Writes or compares the claims of a Markdown file."""
    changed = drifted(path) if check else update(path)
    if check and changed:
        print(
            f"report.py: {path} does not say what the results say: {', '.join(changed)}. "
            f"Run: python training/report.py --claims {path}",
            file=sys.stderr,
        )
        return 1
    print(f"{path}: {'agrees with the results' if not changed else 'wrote ' + ', '.join(changed)}")
    return 0


def portable_command(options: argparse.Namespace) -> str:
    """The command that repeats this call, without absolute folders."""
    words = ["python", "training/report.py", *map(_portable, options.folders)]
    words += ["--output", _portable(options.output)] if options.output else []
    words += ["--figures"] if options.figures else []
    return shlex.join([*words, "--allow_mixed"] if options.allow_mixed else words)


def _portable(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else Path(path).as_posix()


if __name__ == "__main__":
    sys.exit(main())
