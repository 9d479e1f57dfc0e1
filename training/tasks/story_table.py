"""The table of story question answering runs, a function of their results.

    cd training && python -m tasks.story_table ../results/babi/runs

Prints Markdown. The folder holds the results.json of each run as ``<task>-<arm>-seed<number>.json``.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UsageError

MODES = {"noise_off": "noise off", "noise_on": "noise on"}
METRICS = {
    "accuracy": "answers right %",
    "supporting_fact_accuracy": "choices that are supporting facts %",
    "all_supports_found": "all supporting facts chosen %",
}
ARMS = ("softmax", "softmax-tau", "gumbel-soft", "gumbel-st", "det-st")
"""In the order of the rows; other arms follow in alphabetical order."""

Runs = Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]
"""(task, arm) -> seed -> results."""


def read_runs(folder: Path) -> Runs:
    """The results in a folder.

    Raises:
        UsageError: there are none, a file has another name, or a run is not finished.
    """
    runs: dict[tuple[str, str], dict[int, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        name = re.fullmatch(r"([^-]+)-(.+)-seed(\d+)", path.stem)
        if name is None:
            raise UsageError(f"{path.name}: expected a name such as qa2-gumbel-st-seed0.json; rename the file.")
        results = json.loads(path.read_text(encoding="utf-8"))
        if results.get("status") != "finished":
            raise UsageError(f"{path.name}: expected the results of a finished run; take the file away.")
        runs.setdefault((name[1], name[2]), {})[int(name[3])] = results
    if not runs:
        raise UsageError(f"no results in {folder}: expected files such as qa2-gumbel-st-seed0.json.")
    return runs


def table(runs: Runs) -> str:
    """Markdown: one row for each task and arm, mean and range over the seeds."""
    heads = ["task", "arm", "seeds", *(f"{metric}, {mode}" for metric in METRICS.values() for mode in MODES.values())]
    rule = ["---", "---"] + ["---:"] * (len(heads) - 2)
    rows = [_row(task, arm, seeds) for (task, arm), seeds in sorted(runs.items(), key=_order)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *rows]) + "\n"


def _order(item: tuple[tuple[str, str], Any]) -> tuple[str, int, str]:
    (task, arm), _ = item
    return task, ARMS.index(arm) if arm in ARMS else len(ARMS), arm


def _row(task: str, arm: str, seeds: Mapping[int, Mapping[str, Any]]) -> list[str]:
    cells = []
    for metric in METRICS:
        for mode in MODES:
            final = [results["final"][mode] for results in seeds.values() if mode in results["final"]]
            cells.append(_percent([values[metric] for values in final]))
    return [task, arm, ", ".join(map(str, sorted(seeds))), *cells]


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{100 * math.fsum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def main(argv: Sequence[str]) -> int:
    """Prints the table of the folder in ``argv``; the exit status is 2 for a mistake in its use."""
    try:
        if len(argv) != 1:
            raise UsageError(f"expected one folder, got {len(argv)} arguments.")
        print(table(read_runs(Path(argv[0]))), end="")
    except UsageError as error:
        print(f"story_table: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
