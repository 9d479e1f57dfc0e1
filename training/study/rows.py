"""The rows of a study: one JSON file for each finished run, there whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from harness.errors import UsageError
from harness.results import SCHEMA_VERSION

ROWS_FOLDER = "runs"
STUDY_FILE = "study.yaml"
CHOSEN_FILE = "chosen.json"
IDENTITY = ("id", "study", "arm", "seed", "script", "command")
"""What a row has beside the content of its run's results.json."""
_NEEDED = ("status", "schema_version", "config", "final", "versions", "device")
TIMES = frozenset(
    (
        *("started", "train_seconds", "eval_seconds", "wall_seconds", "steps_per_second", "tokens_per_second"),
        *("peak_memory_bytes", "resumed_at_steps"),
    )
)
"""What two rows of the same run may differ in."""
COMPARED = ("torch", "gumbel_attention", "commit", "device")
"""What all rows of a table must have in common."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A finished run.

    Attributes:
        id: ``{arm}-seed{seed}-{hash of its settings}``.
        arm: its arm.
        seed: its seed.
        content: all of the file: :data:`IDENTITY` and what the run wrote into results.json.
        differs: of :data:`COMPARED`, what is not as in most rows it was read with; empty unless mixed rows were
            allowed.
    """

    id: str
    arm: str
    seed: int
    content: dict[str, Any]
    differs: tuple[str, ...] = ()

    def metric(self, mode: str, name: str) -> float:
        """The value of a metric at the last step.

        Args:
            mode: evaluation mode, such as ``noise_off``.
            name: of the metric, such as ``accuracy``.

        Raises:
            UsageError: the run has no such mode or metric; the message names those it has.
        """
        if mode not in self.final:
            raise UsageError(
                f"run {self.id} was not evaluated with mode {mode!r}: it has {', '.join(self.modes)}. "
                "The setting eval_modes says which modes a run evaluates."
            )
        metrics = self.final[mode]
        if name not in metrics:
            raise UsageError(f"run {self.id} has no metric {name!r} in mode {mode!r}: it has {', '.join(metrics)}.")
        return float(metrics[name])

    @property
    def final(self) -> dict[str, dict[str, float]]:
        """Mode -> metric -> value at the last step."""
        final: dict[str, dict[str, float]] = self.content["final"]
        return final

    @property
    def modes(self) -> list[str]:
        """The modes the run was evaluated in."""
        return list(self.final)

    @property
    def config(self) -> dict[str, Any]:
        """All settings of the run, but where it wrote."""
        config: dict[str, Any] = self.content["config"]
        return config

    @property
    def train_series(self) -> list[dict[str, Any]]:
        """The training series, one entry every ``logging_steps``."""
        series: list[dict[str, Any]] = self.content["series"]["train"]
        return series

    @property
    def evaluation_series(self) -> list[dict[str, Any]]:
        """The evaluations, one entry for each step and mode."""
        series: list[dict[str, Any]] = self.content["series"]["evaluation"]
        return series

    @property
    def seconds(self) -> float:
        """What the run took: from start to end where it ran in one go, else training and evaluation."""
        whole = self.content.get("wall_seconds")
        return float(self.content["train_seconds"] + self.content["eval_seconds"] if whole is None else whole)

    @property
    def versions(self) -> dict[str, str | None]:
        """Package -> version; ``python`` is among them."""
        versions: dict[str, str | None] = self.content["versions"]
        return versions

    @property
    def commit(self) -> str | None:
        """The commit of the checkout the run used; None outside git."""
        state = self.content.get("git")
        return None if state is None else state["commit"]

    @property
    def dirty(self) -> bool:
        """Whether files differed from that commit."""
        state = self.content.get("git")
        return bool(state and state["dirty"])

    @property
    def device(self) -> str:
        """The name of the GPU, or the kind of the processor."""
        return str(self.content["device"])

    @property
    def code(self) -> str | None:
        """The commit and whether files differed from it; before it those of earlier parts that other code ran."""
        states = [*self.content.get("earlier_git", []), self.content.get("git")]
        if states == [None]:
            return None
        words = ["no commit" if s is None else s["commit"] + (" with changes" if s["dirty"] else "") for s in states]
        return ", then ".join(words)

    def compared(self) -> dict[str, str | None]:
        """The values of :data:`COMPARED`."""
        return {
            "torch": self.versions.get("torch"),
            "gumbel_attention": self.versions.get("gumbel_attention"),
            "commit": self.code,
            "device": self.device,
        }

    def without_times(self) -> dict[str, Any]:
        """The content that a repetition of the run gives again."""
        return {key: value for key, value in self.content.items() if key not in TIMES}


def read_rows(folder: Path, allow_mixed: bool = False, rows_folder: str = ROWS_FOLDER) -> list[Row]:
    """The finished runs of a study.

    A folder with a study.yaml is one that a study runs in: what lies there from an earlier plan is passed over.

    Args:
        folder: of the study.
        allow_mixed: take rows of different versions, commits or devices, and mark them in ``differs``.
        rows_folder: ``runs``, or ``search`` for the runs of its search.

    Returns:
        The rows in the order of the plan; without a study.yaml by arm and seed.

    Raises:
        UsageError: a file is no row, or the rows are mixed.
    """
    planned = _planned(folder, rows_folder)
    if planned is None:
        paths = (path for path in (folder / rows_folder).glob("*.json") if path.name != CHOSEN_FILE)
        rows = sorted(map(load_row, paths), key=lambda row: (row.arm, row.seed, row.id))
    else:
        paths = (folder / rows_folder / f"{name}.json" for name in planned)
        rows = [load_row(path) for path in paths if path.exists()]
    found = mixtures(rows)
    if not found:
        return rows
    if not allow_mixed:
        raise UsageError(
            f"the rows in {str(folder / rows_folder)!r} are mixed: {_listed(found)}. Remove the files of one kind and "
            "run the study again, or allow mixed rows, which marks them."
        )
    usual = {key: _most_common(counts) for key, counts in found.items()}
    return [dataclasses.replace(row, differs=_differences(row, usual)) for row in rows]


def mixtures(rows: Sequence[Row]) -> dict[str, Counter[str | None]]:
    """What of :data:`COMPARED` has more than one value in ``rows``: name -> value -> number of rows."""
    counts = {key: Counter(row.compared()[key] for row in rows) for key in COMPARED}
    return {key: count for key, count in counts.items() if len(count) > 1}


def load_row(path: Path) -> Row:
    """Reads a row.

    Raises:
        UsageError: the file is none; the message says what is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{str(path)!r} is not the row of a run: {error}. Remove it and run the study again."
        ) from error
    problem = _problem(content, path.stem)
    if problem:
        raise UsageError(f"{str(path)!r} is not the row of a run: {problem}. Remove it and run the study again.")
    return Row(content["id"], content["arm"], content["seed"], content)


def is_row(path: Path) -> bool:
    """Whether the file exists and is a row."""
    try:
        load_row(path)
    except UsageError:
        return False
    return True


def write_row(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a row in such a way that after a loss of power, too, the file is whole or not there."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    write_durably(path, text + "\n")
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed just there
        leftover.unlink(missing_ok=True)


def write_durably(path: Path, text: str) -> None:
    """Writes a file by way of a temporary name in its folder, and waits until it lies on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _planned(folder: Path, rows_folder: str) -> list[str] | None:
    """The ids that study.yaml lists; None if there is no such file."""
    path = folder / STUDY_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        planned: list[str] = content["planned"][rows_folder]
    except FileNotFoundError:
        return None
    except (OSError, yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} is not the file of a study: {error!r}.") from error
    return planned


def _problem(content: Any, stem: str) -> str | None:
    """What is wrong with a row; None if nothing is."""
    if not isinstance(content, dict):
        return "expected a JSON object"
    missing = [key for key in (*IDENTITY, *_NEEDED) if key not in content]
    if missing:
        return f"it has no {', '.join(missing)}"
    if content["schema_version"] != SCHEMA_VERSION:
        return f"it has schema_version {content['schema_version']!r}, this program reads {SCHEMA_VERSION}"
    if content["status"] != "finished":
        return f"its status is {content['status']!r}, expected 'finished'"
    if content["id"] != stem:
        return f"it is that of {content['id']!r}"
    return None


def _listed(found: Mapping[str, Counter[str | None]]) -> str:
    return "; ".join(
        f"{key}: {', '.join(f'{value} ({number} rows)' for value, number in counts.most_common())}"
        for key, counts in found.items()
    )


def _most_common(counts: Counter[str | None]) -> str | None:
    return min(counts, key=lambda value: (-counts[value], str(value)))


def _differences(row: Row, usual: Mapping[str, str | None]) -> tuple[str, ...]:
    return tuple(key for key, value in row.compared().items() if key in usual and usual[key] != value)
