"""Every estimator on every small problem: what was sampled, and how it compares with the exact gradient."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from harness.gradient_problems import Problem, exact_gradient, one_row, two_rows
from harness.gradient_samples import Setting, pathwise_estimates, pathwise_settings, score_function_estimates
from harness.gradient_statistics import Quality, assess

_SMALLEST_SHARE = 50


@dataclass(frozen=True)
class Plan:
    """What to sample.

    Attributes:
        sizes: keys of the single rows; 2 among them, for which expectations can be integrated.
        weight_size: keys of the row whose loss sees the weights.
        stacked_size: keys of each of the two stacked rows.
        taus: temperatures, rising.
        samples: numbers K.
        count: choices for each setting, so many gradient estimates; Gumbel-Rao with its K samples of noise for one
            choice makes a K-th as many, but not less than a 50th. The score function groups the same choices by K.
        seed: of problems and noise.
    """

    sizes: tuple[int, ...] = (2, 4, 12)
    weight_size: int = 4
    stacked_size: int = 4
    taus: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
    samples: tuple[int, ...] = (1, 10, 100)
    count: int = 200_000
    seed: int = 0

    def changed(self, **fields: Any) -> Plan:
        """This plan with other values in these fields."""
        return dataclasses.replace(self, **fields)

    def problems(self) -> list[Problem]:
        """The problems of this plan."""
        rows = [one_row(keys, self.seed) for keys in self.sizes]
        return [*rows, one_row(self.weight_size, self.seed, of_weights=True), two_rows(self.stacked_size, self.seed)]


@dataclass
class Study:
    """What was sampled: for every problem and loss the quality of every setting, and the exact gradient."""

    plan: Plan
    problems: list[Problem]
    results: dict[tuple[str, str], dict[Setting, Quality]] = field(default_factory=dict)

    def cases(self) -> Iterator[tuple[Problem, str, dict[Setting, Quality]]]:
        """Problem, loss and results by setting."""
        for problem in self.problems:
            for loss in problem.losses:
                yield problem, loss, self.results[problem.name, loss]


def run_study(plan: Plan, tell: Callable[[str], None] = print) -> Study:
    """Samples every setting of the plan."""
    study = Study(plan, plan.problems())
    for problem in study.problems:
        truth = {name: exact_gradient(problem, loss) for name, loss in problem.losses.items()}
        study.results |= {(problem.name, name): {} for name in problem.losses}
        for setting in pathwise_settings(plan.taus, plan.samples):
            count = plan.count // min(setting.samples, _SMALLEST_SHARE)
            estimates = pathwise_estimates(problem, setting, count, _seed(plan, problem, setting))
            for name, values in estimates.items():
                study.results[problem.name, name][setting] = assess(values, truth[name])
        _add_score_function(study, problem, truth)
        tell(f"  {problem.name}: {len(study.results[problem.name, 'linear'])} settings, {len(truth)} losses")
    return study


def _add_score_function(study: Study, problem: Problem, truth: dict[str, Tensor]) -> None:
    plan = study.plan
    seed = _seed(plan, problem, Setting("reinforce"))
    estimates = score_function_estimates(problem, plan.samples, plan.count, seed)
    for (name, baseline, samples), values in estimates.items():
        setting = Setting("reinforce", samples=samples, baseline=baseline)
        study.results[problem.name, name][setting] = assess(values, truth[name])


def _seed(plan: Plan, problem: Problem, setting: Setting) -> int:
    """A noise seed of its own for every setting: 31 bits of its name."""
    return zlib.crc32(f"{plan.seed} {problem.name} {setting}".encode()) >> 1


def by_arm(results: dict[Setting, Quality], arm: str, **fields: Any) -> dict[Setting, Quality]:
    """Those results whose setting has this arm and these fields."""
    return {
        setting: quality
        for setting, quality in results.items()
        if setting.arm == arm and all(getattr(setting, name) == value for name, value in fields.items())
    }
