"""The answers to a study's questions: better, worse, or no difference found, each with its numbers in one sentence.

A question is answered by :mod:`study.statistics`: paired by seed, by the t-test, corrected over all of the study's
questions, whichever metric and mode they are about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from harness.errors import UsageError
from study.plan import Study
from study.questions import Condition, Question
from study.rows import Row
from study.scripts import SCRIPTS
from study.statistics import ALPHA, POWER, Comparison, Pairs, compare, holm, pair, smallest_visible

Outcome = Literal["better", "worse", "no difference found"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer to a question.

    Attributes:
        question: as planned.
        outcome: what the compared side is, measured by the one it is compared against.
        better: whether "higher" or "lower" values of the metric are.
        pairs: the values, by seed; their difference is compared minus against.
        comparison: its statistics.
        corrected_p: p of the t-test after Holm's correction over all questions.
        questions: how many there are.
        smallest_visible: the smallest true difference that would have been found with a probability of 80 % at the
            level alpha / questions, were the deviation of the differences the observed one; None if that is 0.
        alpha: the family-wise level.
        mixed: whether one of the rows comes from another version, commit or device than most.
    """

    question: Question
    outcome: Outcome
    better: Literal["higher", "lower"]
    pairs: Pairs
    comparison: Comparison
    corrected_p: float
    questions: int
    smallest_visible: float | None
    alpha: float = ALPHA
    mixed: bool = False

    @property
    def sentence(self) -> str:
        """The verdict in words, with the numbers it rests on."""
        found = self.comparison
        first, second, mode = _sides(self.question)
        numbers = (
            f"{_signed(found.mean)} (95 % interval {_signed(found.student.low)} to {_signed(found.student.high)}), "
            f"{found.pairs} seeds, corrected p {probability(self.corrected_p)}"
        )
        if self.outcome == "no difference found":
            text = f"No difference found between {first} and {second} in {self.question.metric}{mode}: {numbers}. "
            text += self._unseen()
        else:
            text = (
                f"{first} is {self.outcome} than {second} in {self.question.metric}{mode}: {numbers}.{self._support()}"
            )
        return text + self._left_out()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON, the sentence among them."""
        pairs = {
            "seeds": list(self.pairs.seeds),
            "compared": self.pairs.first.tolist(),
            "against": self.pairs.second.tolist(),
            "dropped": list(self.pairs.dropped),
        }
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own |= {"question": dataclasses.asdict(self.question), "comparison": dataclasses.asdict(self.comparison)}
        return {**own, "pairs": pairs, "support": self.comparison.support(self.alpha), "sentence": self.sentence}

    def _unseen(self) -> str:
        if self.smallest_visible is None:
            return "All seeds gave equal values, so what could have been seen is unknown."
        return (
            f"A difference of {self.smallest_visible:.2g} would have been found with {100 * POWER:.0f} % probability, "
            "if the differences vary as they did here."
        )

    def _support(self) -> str:
        found = self.comparison
        said = found.support(self.alpha)
        if said == "cannot tell":
            return (
                f" It rests on the t-test alone: with {found.pairs} seeds the sign-flip test gives no p below "
                f"{found.sign_flip_floor:.3g} (here {found.sign_flip_p:.3g})."
            )
        if said == "disagrees":
            return f" The sign-flip test does not show it (p {probability(found.sign_flip_p)}): read it with caution."
        return ""

    def _left_out(self) -> str:
        dropped = self.pairs.dropped
        text = f" Left out, as only one side has them: seeds {', '.join(map(str, dropped))}." if dropped else ""
        return text + (" The rows are of mixed versions." if self.mixed else "")


def judge(study: Study, rows: Sequence[Row], alpha: float = ALPHA) -> list[Verdict]:
    """The verdicts on a study's questions, in their order.

    Args:
        study: whose questions are asked. All of them count in the correction.
        rows: its finished runs.
        alpha: the probability of one or more false alarms in the study, if no two sides differ.

    Raises:
        UsageError: two rows of one arm and seed; a question whose sides share fewer than two seeds, or whose runs
            lack its mode or metric; the message names the question.
    """
    _refuse_repeated(rows)
    found = []
    for question in study.questions:
        try:
            sides = [_values(side, question.metric, rows) for side in (question.compare, question.against)]
            pairs = pair(*sides)
        except UsageError as error:
            raise UsageError(f"question {question.id!r}: {error}") from error
        found.append((question, pairs, compare(pairs)))
    corrected = holm([comparison.p for _, _, comparison in found])
    verdicts = []
    for (question, pairs, comparison), p in zip(found, corrected, strict=True):
        better = direction(study, question.metric)
        arms = (question.compare.arm, question.against.arm)
        mixed = any(row.differs for row in rows if row.arm in arms and row.seed in pairs.seeds)
        outcome = _outcome(comparison.mean, float(p), better, alpha)
        visible = visible_at(comparison, alpha / len(found))
        verdicts.append(
            Verdict(question, outcome, better, pairs, comparison, float(p), len(found), visible, alpha, mixed)
        )
    return verdicts


def direction(study: Study, metric: str) -> Literal["higher", "lower"]:
    """Whether higher or lower values are better: the study says it of its own metric, the script of the others."""
    return study.better if metric == study.metric else SCRIPTS[study.script].metrics[metric]


def visible_at(comparison: Comparison, level: float) -> float | None:
    """The smallest difference that a test at ``level`` finds in 80 % of studies; None if all differences are 0."""
    deviation = max(comparison.deviation, comparison.resolution)
    return smallest_visible(deviation, comparison.pairs, level) if deviation > 0 else None


def probability(p: float) -> str:
    """``= 0.012`` or ``< 0.0001``."""
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}"


def _outcome(mean: float, p: float, better: str, alpha: float) -> Outcome:
    if p > alpha:
        return "no difference found"
    return "better" if (mean > 0) == (better == "higher") else "worse"


def _values(side: Condition, metric: str, rows: Sequence[Row]) -> dict[int, float]:
    """The metric of one side by seed."""
    return {row.seed: row.metric(side.mode, metric) for row in rows if row.arm == side.arm}


def _refuse_repeated(rows: Sequence[Row]) -> None:
    seen: dict[tuple[str, int], str] = {}
    for row in rows:
        other = seen.setdefault((row.arm, row.seed), row.id)
        if other != row.id:
            raise UsageError(
                f"there are two runs of arm {row.arm!r} with seed {row.seed}, {other} and {row.id}: one of them is "
                "from an earlier plan. Remove it."
            )


def _sides(question: Question) -> tuple[str, str, str]:
    """How the sides are called, and the mode where they share it."""
    first, second = question.compare, question.against
    if first.mode == second.mode:
        return first.arm, second.arm, f" ({first.mode})"
    return f"{first.arm} ({first.mode})", f"{second.arm} ({second.mode})", ""


def _signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"
