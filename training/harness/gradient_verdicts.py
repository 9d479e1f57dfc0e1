"""What a relation between estimators is, and how its numbers are put into words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from harness.gradient_problems import Problem, exact_gradient, pair_expectation, straight_through_limit
from harness.gradient_samples import Setting
from harness.gradient_statistics import Comparison, Quality
from harness.gradient_study import Study, by_arm


@dataclass(frozen=True)
class Relation:
    """A statement, whether what was sampled bears it out, and by which numbers.

    ``verdict`` is "holds", "does not hold" or "undecided".
    """

    name: str
    verdict: str
    numbers: str

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}; {self.numbers}"


def verdict(contradicted: bool, shown: bool) -> str:
    """Samples may contradict a statement, show it, or be too few for either."""
    if contradicted:
        return "does not hold"
    return "holds" if shown else "undecided"


def by_tau(results: dict[Setting, Quality], arm: str) -> dict[float, Quality]:
    """The arm's results by temperature."""
    return {setting.tau: quality for setting, quality in by_arm(results, arm).items() if setting.tau is not None}


def limit_bias(problem: Problem, loss: str) -> float:
    """Relative bias of straight-through as tau -> 0."""
    truth = exact_gradient(problem, problem.losses[loss])
    return relative(straight_through_limit(problem, problem.losses[loss]), truth)


def pair_bias(study: Study, tau: float, *, hard: bool) -> dict[str, float]:
    """Exact relative bias by loss for the row of two keys."""
    problem = next(problem for problem in study.problems if problem.keys == 2 and problem.rows == 1)
    return {
        name: relative(pair_expectation(problem, loss, tau, hard=hard), exact_gradient(problem, loss))
        for name, loss in problem.losses.items()
    }


def relative(gradient: torch.Tensor, truth: torch.Tensor) -> float:
    """Length of the difference in units of the truth's."""
    return float((gradient - truth).norm() / truth.norm())


def worst(found: Sequence[Comparison]) -> str:
    """The comparison that comes closest to its limit, or exceeds it furthest."""
    item = max(found, key=lambda item: abs(item.z) / item.limit)
    return f"largest |z| {abs(item.z):.2f}, limit {item.limit:.2f},"


def mildest(found: Sequence[Comparison]) -> str:
    """The one that stays furthest below it, or exceeds it least."""
    item = min(found, key=lambda item: abs(item.z) / item.limit)
    return f"smallest |z| {abs(item.z):.1f}, limit {item.limit:.2f}"


def spread_of(values: Iterable[float]) -> str:
    """Smallest and largest."""
    listed = list(values)
    return f"{min(listed):.3g} to {max(listed):.3g}"


def listed(values: Iterable[float]) -> str:
    """All of them."""
    return ", ".join(f"{value:g}" for value in values)


def share(values: Sequence[bool]) -> str:
    """How many of them are true."""
    return f"{sum(values)} of {len(values)}"
