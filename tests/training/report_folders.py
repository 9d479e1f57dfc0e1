"""Folders of finished studies with known numbers, as the runner leaves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from studies import row_of, write_rows

from study.folder import write_study
from study.plan import Study, load_study

MODES = ("noise_off", "noise_on", "mean_4", "mean_16", "hard", "soft")
BASE = {"train_file": "a.tsv", "validation_file": "b.tsv", "eval_modes": list(MODES)}
Value = Callable[[str, int, str], float]
"""(arm, seed, mode) -> the metric."""


def make_study(
    folder: Path,
    value: Value,
    arms: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    modes: Sequence[str] = MODES,
    change: Callable[[dict[str, Any]], None] = lambda row: None,
    **more: Any,
) -> Study:
    """Writes study.yaml and a row for every run; ``change`` may alter each row."""
    folder.mkdir(parents=True, exist_ok=True)
    base = BASE | {"eval_modes": list(modes)} | more.pop("base", {})
    content = {"title": "A study", "base": base, "arms": dict(arms), "seeds": list(seeds), **more}
    path = folder.parent / f"{folder.name}-plan.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    study = load_study(path, str(folder))
    write_study(study)
    rows = []
    for run in study.runs:
        final = {mode: {study.metric: value(run.arm, run.seed, mode), "loss": 0.5} for mode in modes}
        row = row_of(run.arm, run.seed, id=run.id, final=final, config=run.args.to_dict(), steps=100)
        row |= {"train_seconds": 50.0, "peak_memory_bytes": 300 * 2**20, "num_processes": 1, "num_threads": 1}
        change(row)
        rows.append(row)
    write_rows(folder / "runs", rows)
    return study


def question(name: str, compare: str, against: str, modes: tuple[str, str] = ("noise_off", "noise_off")) -> Any:
    sides = [{"arm": arm, "mode": mode} for arm, mode in zip((compare, against), modes, strict=True)]
    return {"id": name, "text": f"Is it {name}?", "compare": sides[0], "against": sides[1]}
