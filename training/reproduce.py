"""Runs a study again, from nothing, and compares every mean with the interval that a results folder states.

    python training/reproduce.py --config configs/ablation/story.yaml --against results/story --output_dir study_output
        [--jobs N]

For each arm and evaluation mode the new mean of the study's metric over the seeds must lie in the 95 % Student-t
interval over the seeds of ``--against``. On the same kind of processor and with one thread per run the rows come out
the same to the bit; elsewhere arithmetic rounds differently, and training carries that on to other numbers. Runs
that an interrupted call left finished in ``--output_dir`` are counted, not repeated. Exit status 1 if a mean lies
outside, or a run failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import ablate
from harness.errors import UsageError
from study.folder import check_same_study, chosen_before, read_study
from study.plan import load_study
from study.process import Starter, SupervisedProcess
from study.rows import Row, is_row, read_rows
from study.statistics import Interval, student_interval


@dataclasses.dataclass(frozen=True)
class Reproduced:
    """The mean of an arm in a mode beside the interval that it is to lie in.

    Attributes:
        arm: the arm.
        mode: the evaluation mode.
        stated: 95 % interval over the seeds of the committed rows.
        mean: over the seeds of the new rows.
        same: how many of the new values equal the committed ones of their seed, of how many.
    """

    arm: str
    mode: str
    stated: Interval
    mean: float
    same: tuple[int, int]

    @property
    def inside(self) -> bool:
        """Whether the mean lies in the interval, to rounding."""
        slack = 1e-12 * max(1.0, abs(self.mean))
        return self.stated.low - slack <= self.mean <= self.stated.high + slack


def compare(stated: Sequence[Row], new: Sequence[Row], metric: str) -> list[Reproduced]:
    """Every arm and mode of the stated rows.

    Raises:
        UsageError: an arm, a seed or a mode is missing from the new rows, or an arm has fewer than two seeds.
    """
    found = {(row.arm, row.seed): row for row in new}
    results = []
    for arm in dict.fromkeys(row.arm for row in stated):
        rows = [row for row in stated if row.arm == arm]
        missing = [row.seed for row in rows if (arm, row.seed) not in found]
        if missing or len(rows) < 2:
            raise UsageError(f"arm {arm!r}: expected two seeds or more, all run again; seeds {missing} were not.")
        for mode in rows[0].modes:
            before = [row.metric(mode, metric) for row in rows]
            again = [found[arm, row.seed].metric(mode, metric) for row in rows]
            same = sum(a == b for a, b in zip(before, again, strict=True))
            interval = student_interval(before)
            results.append(Reproduced(arm, mode, interval, statistics.fmean(again), (same, len(rows))))
    return results


def table(results: Sequence[Reproduced], metric: str) -> str:
    """The comparison as a Markdown table."""
    lines = [
        f"| arm | mode | {metric}: stated interval | run again | inside | equal values |",
        "|---|---|---|---|---|---|",
    ]
    for item in results:
        stated = f"{item.stated.low:.4f} to {item.stated.high:.4f}"
        inside = "yes" if item.inside else "**no**"
        lines.append(
            f"| {item.arm} | {item.mode} | {stated} | {item.mean:.4f} | {inside} | {item.same[0]} of {item.same[1]} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, start: Starter = SupervisedProcess) -> int:
    """Runs and compares.

    Returns:
        Exit status: 0, 1 if a mean lies outside or a run failed, 2 for a mistake in the settings.
    """
    options = parse_options(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        committed = read_study(options.against)
        stated = read_rows(Path(options.against), allow_mixed=True)
        study = load_study(options.config, options.output_dir)
        check_same_study(committed, study)
        if study.output_dir.resolve() == committed.output_dir.resolve():
            raise UsageError(f"--output_dir and --against are both {options.against!r}: nothing would run again.")
        before = sum(is_row(run.row) for run in study.with_chosen(chosen_before(study)).runs)
        output_dir = ["--output_dir", options.output_dir]
        status = ablate.main(["--config", options.config, *output_dir, "--jobs", str(options.jobs)], start)
        if status != 0:
            return status
        results = compare(stated, read_rows(Path(options.output_dir)), committed.metric)
    except UsageError as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 2
    print(table(results, committed.metric))
    outside = [item for item in results if not item.inside]
    equal, values = (sum(item.same[i] for item in results) for i in (0, 1))
    print(
        f"\n{len(results) - len(outside)} of {len(results)} means inside; {equal} of {values} values equal to the bit."
        + (f" {before} of {len(study.runs)} runs were there from an earlier call." if before else "")
    )
    return 1 if outside or any(math.isnan(item.mean) for item in results) else 0


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="YAML file of the study")
    parser.add_argument("--against", required=True, help="folder of the study's committed rows")
    parser.add_argument("--output_dir", required=True, help="where the study runs again")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time; 1 unless given")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
