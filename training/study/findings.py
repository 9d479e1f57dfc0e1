"""What the folder of a study says: its finished runs by arm, the answers to its questions, and what is missing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from harness.errors import UsageError
from harness.evaluation import HARD, NOISE_OFF, NOISE_ON, SOFT
from study.folder import read_study
from study.plan import SEARCH_FOLDER, Study
from study.questions import modes_of
from study.rows import CHOSEN_FILE, STUDY_FILE, Row, read_rows
from study.statistics import CONFIDENCE
from study.verdicts import Verdict, judge

_MODE_WORDS = {NOISE_OFF: "noise off", NOISE_ON: "noise on", HARD: "hard", SOFT: "soft"}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds; ``half_width`` is that of its 95 % Student-t interval, None for fewer than two seeds."""

    values: tuple[float, ...]
    mean: float
    half_width: float | None

    def __str__(self) -> str:
        spread = "" if self.half_width is None else f" ± {self.half_width:.4f}"
        return f"{self.mean:.4f}{spread}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student-t interval: half width t(n-1) * s / sqrt(n).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("an estimate needs at least one value, got none.")
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Estimate(tuple(values), mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(tuple(values), mean, quantile * math.sqrt(variance / count))


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm and its finished runs, by seed."""

    name: str
    rows: tuple[Row, ...]

    @property
    def mixed(self) -> bool:
        """Whether a run is of another version, commit or device than most of the study."""
        return any(row.differs for row in self.rows)

    def values(self, mode: str, metric: str) -> dict[int, float]:
        """Seed -> value at the last step, of the runs that have it."""
        return {row.seed: row.metric(mode, metric) for row in self.rows if metric in row.final.get(mode, {})}

    def estimate(self, mode: str, metric: str) -> Estimate | None:
        """Mean and interval over the seeds; None if no run has that mode and metric."""
        values = list(self.values(mode, metric).values())
        return estimate(values) if values else None


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that a report needs of a study.

    Attributes:
        study: as planned.
        arms: in the order of the plan, also those without a finished run.
        verdicts: on the questions that can be answered, in their order.
        unanswered: id of a question -> why it cannot be answered.
        failed: id of a run -> how its last try ended.
        search: search/chosen.json; None without one.
    """

    study: Study
    arms: tuple[Arm, ...]
    verdicts: tuple[Verdict, ...]
    unanswered: dict[str, str]
    failed: dict[str, str]
    search: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.study.output_dir.resolve().name

    @property
    def shown(self) -> str:
        """The folder as given, but no absolute one: a report names no folder of a machine."""
        folder = self.study.output_dir
        return folder.name if folder.is_absolute() else folder.as_posix()

    @property
    def rows(self) -> list[Row]:
        """All finished runs, arm by arm."""
        return [row for arm in self.arms for row in arm.rows]

    @property
    def mode(self) -> str:
        """The main mode: noise off where there is that."""
        return self.modes[0]

    @property
    def modes(self) -> list[str]:
        """The modes that runs were evaluated in: noise off, on, means by their number of samples, hard, soft."""
        found = {mode for row in self.rows for mode in row.modes}
        planned = {mode for run in self.study.runs for mode in modes_of(run.args)}
        return sorted(found or planned, key=mode_order)

    @property
    def metrics(self) -> list[str]:
        """The metrics of the runs, the study's own first."""
        names = dict.fromkeys(name for row in self.rows for values in row.final.values() for name in values)
        return [self.study.metric, *(name for name in names if name != self.study.metric)]

    @property
    def missing(self) -> dict[str, list[int]]:
        """The runs that are planned and not finished: arm -> seeds."""
        finished = {(row.arm, row.seed) for row in self.rows}
        seeds: dict[str, list[int]] = {}
        for run in self.study.runs:
            if (run.arm, run.seed) not in finished:
                seeds.setdefault(run.arm, []).append(run.seed)
        return seeds

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def read_findings(folder: str | Path, allow_mixed: bool = False) -> Findings:
    """Reads the folder of a study.

    Args:
        folder: with study.yaml and runs/.
        allow_mixed: take runs of different versions, commits or devices, and mark them.

    Raises:
        UsageError: no such folder, no study in it, no finished run, or runs of mixed versions.
    """
    folder = Path(folder)
    if not (folder / STUDY_FILE).is_file():
        raise UsageError(
            f"{str(folder)!r} is not the folder of a study: it has no {STUDY_FILE}. Pass the output_dir of a study "
            "that training/ablate.py has run."
        )
    study = read_study(folder)
    rows = read_rows(folder, allow_mixed)
    if not rows:
        raise UsageError(
            f"{str(folder)!r} holds no finished run of its study yet ({len(study.runs)} are planned): run "
            "training/ablate.py first."
        )
    return findings_of(study, rows)


def findings_of(study: Study, rows: Sequence[Row]) -> Findings:
    """The findings of rows that are read already, also of none."""
    arms = tuple(Arm(name, tuple(row for row in rows if row.arm == name)) for name in study.arms)
    answered, unanswered = [], {}
    for question in study.questions:
        try:
            judge(dataclasses.replace(study, questions=(question,)), rows)
        except UsageError as error:
            unanswered[question.id] = str(error)
        else:
            answered.append(question)
    verdicts = judge(dataclasses.replace(study, questions=tuple(answered)), rows) if answered else []
    chosen = study.output_dir / SEARCH_FOLDER / CHOSEN_FILE
    return Findings(
        study=study,
        arms=arms,
        verdicts=tuple(verdicts),
        unanswered=unanswered,
        failed=_failed(study),
        search=_read_json(chosen) if chosen.exists() else None,
    )


def mode_words(mode: str) -> str:
    """A mode as tables name it."""
    return _MODE_WORDS.get(mode, mode.replace("mean_", "mean of "))


def mode_order(mode: str) -> tuple[int, int]:
    """Sorts modes: noise off, noise on, means by their number of samples, hard, soft."""
    mean = re.fullmatch(r"mean_(\d+)", mode)
    known = [NOISE_OFF, NOISE_ON, "", HARD, SOFT]
    return (2, int(mean[1])) if mean else (known.index(mode) if mode in known else len(known), 0)


def metric_words(metric: str) -> str:
    """A metric as tables name it."""
    return metric.replace("_", " ")


def _failed(study: Study) -> dict[str, str]:
    """Of the runs that are planned; what failed under an earlier plan is passed over."""
    runs = [*study.runs, *(study.search.runs if study.search else ())]
    return {run.id: _last_words(_read_json(run.failure)) for run in runs if run.failure.exists()}


def _last_words(content: Mapping[str, Any]) -> str:
    """How a run ended, in a line."""
    lines = [str(line).strip() for line in content.get("log", []) if str(line).strip()]
    return f"{content.get('reason', 'failed')}: {lines[-1] if lines else '(the log is empty)'}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{str(path)!r} must hold a JSON object.")
    return content
