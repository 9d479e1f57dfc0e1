"""The questions of a study: comparisons of two arms, or of two evaluation modes, planned before the runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.arguments import RunArguments
from harness.errors import UsageError
from harness.evaluation import NOISE_OFF, evaluation_modes
from harness.parsing import refuse_unknown

_KEYS = ("id", "text", "compare", "against", "metric")
_ID = re.compile(r"[A-Za-z0-9_]+")


@dataclasses.dataclass(frozen=True)
class Condition:
    """One side of a comparison: an arm, evaluated in a mode."""

    arm: str
    mode: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A planned comparison, paired by seed.

    Attributes:
        id: a word, by which results name it.
        text: the question in words.
        compare: the side that is asked about.
        against: the side it is compared with.
        metric: what is compared.
    """

    id: str
    text: str
    compare: Condition
    against: Condition
    metric: str


def read_questions(
    value: Any, arms: Mapping[str, RunArguments], metrics: Mapping[str, str], metric: str, seeds: int, path: str | Path
) -> tuple[Question, ...]:
    """The checked questions of a study.

    Args:
        value: what the file has under ``questions``.
        arms: name -> settings of the arm.
        metrics: those of the script.
        metric: of a question that names none.
        seeds: how many the study has.
        path: the file, for messages.

    Raises:
        UsageError: an unknown key, arm, mode or metric; fewer than two seeds; two questions of one id.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise UsageError(f"questions in {path}: expected a list, got {value!r}.")
    if value and seeds < 2:
        raise UsageError(f"questions in {path} need at least 2 seeds to be tested, got {seeds}: add seeds.")
    questions: list[Question] = []
    for number, item in enumerate(value, start=1):
        question = _question(item, arms, metrics, metric, f"question {number} of {path}")
        if question.id in [other.id for other in questions]:
            raise UsageError(f"question {number} of {path}: the id {question.id!r} is there twice.")
        questions.append(question)
    return tuple(questions)


def modes_of(args: RunArguments) -> tuple[str, ...]:
    """The modes in which a run of these settings is evaluated."""
    if args.attention == "unpatched":
        return (NOISE_OFF,)
    return tuple(mode.name for mode in evaluation_modes(args.eval_modes))


def _question(
    item: Any, arms: Mapping[str, RunArguments], metrics: Mapping[str, str], metric: str, where: str
) -> Question:
    if not isinstance(item, dict):
        raise UsageError(f"{where}: expected a mapping with {', '.join(_KEYS)}, got {item!r}.")
    refuse_unknown(item, _KEYS, f"in {where}")
    missing = [key for key in _KEYS[:-1] if key not in item]
    if missing:
        raise UsageError(f"{where} has no {', '.join(missing)}.")
    name, text, compared = item["id"], item["text"], item.get("metric", metric)
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise UsageError(f"{where}: expected an id of letters, digits and '_', got {name!r}.")
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: expected the question in words as text, got {text!r}.")
    if compared not in metrics:
        raise UsageError(f"{where}: there is no metric {compared!r}; the script has {', '.join(metrics)}.")
    compare, against = (_condition(item[key], arms, f"{key} of {where}") for key in ("compare", "against"))
    if compare == against:
        raise UsageError(f"{where} compares {compare.arm}, {compare.mode} with itself.")
    return Question(name, text.strip(), compare, against, compared)


def _condition(value: Any, arms: Mapping[str, RunArguments], where: str) -> Condition:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected {{arm: ..., mode: ...}}, got {value!r}.")
    refuse_unknown(value, ("arm", "mode"), f"in {where}")
    arm, mode = value.get("arm"), value.get("mode", NOISE_OFF)
    if not isinstance(arm, str) or arm not in arms:
        raise UsageError(f"{where}: no arm is called {arm!r}; the arms are {', '.join(arms)}.")
    known = modes_of(arms[arm])
    if mode not in known:
        raise UsageError(f"{where}: arm {arm!r} is not evaluated in mode {mode!r}, but in {', '.join(known)}.")
    return Condition(arm, mode)
