"""Runs an ablation study: every arm with every seed, then a table and a plot.

    python training/ablate.py --config configs/ablation/sst2_minilm.yaml
        [--output_dir DIR] [--only ARM,ARM] [--dry_run]

The file holds ``base`` (settings of the script), ``arms`` (name: settings that differ), ``seeds``, ``output_dir`` and,
for another one than finetune.py and its accuracy, ``script`` (its name without .py) and ``metric``. Each run is one
``accelerate launch`` of the script in ``output_dir/runs``; finished runs are
not repeated, so that a stopped study goes on where it was. A run has its final folder name only when finished.
table.md, summary.json and a plot named after the metric are brought up to date after every run.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from harness.ablation import (
    FINETUNE_ONLY,
    PlannedRun,
    Runner,
    Study,
    launch_command,
    load_study,
    run_process,
    run_study,
)
from harness.errors import UsageError
from harness.report import TABLE_FILE, table, write_report
from tasks.language_arguments import LanguageModelArguments

SCRIPTS = {**FINETUNE_ONLY, "language_model": LanguageModelArguments}


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived."""


def main(argv: Sequence[str] | None = None, runner: Runner = run_process) -> int:
    """Runs the study.

    Returns:
        Exit status: 0, or 1 if a run failed, 2 for a mistake in the settings, 130 if interrupted.
    """
    options = parse_options(argv)
    try:
        study = load_study(options.config, options.output_dir, SCRIPTS)
        runs = select_runs(study, options.only)
    except UsageError as error:
        print(f"ablate.py: error: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print_plan(runs)
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        failures = run_study(runs, lambda: write_report(study), runner)
        summaries = write_report(study)
    except Interrupted as error:
        print(f"ablate.py: {error}; finished runs are kept, start again to go on.", file=sys.stderr)
        return 130
    print(f"\n{table(summaries, study.metric)}\nin {study.output_dir / TABLE_FILE}")
    for name, message in failures.items():
        print(f"ablate.py: run {name} failed: {message}", file=sys.stderr)
    return 1 if failures else 0


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="YAML file of the study")
    parser.add_argument("--output_dir", help="overrides the one in the file")
    parser.add_argument("--only", metavar="ARM,ARM", help="run these arms only; the report covers all")
    parser.add_argument("--dry_run", action="store_true", help="show the runs and their commands")
    return parser.parse_args(argv)


def select_runs(study: Study, only: str | None) -> list[PlannedRun]:
    """The runs of the arms named in the comma-separated ``only``; None selects all.

    Raises:
        UsageError: no such arm.
    """
    if only is None:
        return study.runs
    wanted = [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in study.arms:
            raise UsageError(f"--only names the arm {name!r}, the study has {', '.join(study.arms)}.")
    return [run for run in study.runs if run.arm in wanted]


def print_plan(runs: Sequence[PlannedRun]) -> None:
    """Prints each run, whether it is finished, and its command."""
    for run in runs:
        state = "to run" if run.results() is None else "finished"
        print(f"{run.name} ({state})\n    {' '.join(launch_command(run))}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    for repeated in (signal.SIGINT, signal.SIGTERM):  # what ends the child is not to be interrupted in turn
        signal.signal(repeated, signal.SIG_IGN)
    raise Interrupted(f"stopped by {signal.Signals(number).name}")


if __name__ == "__main__":
    sys.exit(main())
