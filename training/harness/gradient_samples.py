"""Gradient estimates of the small problems, sampled with the library's own functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gumbel_attention as ga
from harness.gradient_problems import Problem

SCORE_FUNCTION = "score_function"
PATHWISE: dict[str, dict[str, Any]] = {
    "gumbel-soft": {"noise": "gumbel", "hard": False},
    "softmax-tau": {"noise": "none", "hard": False},
    "gumbel-st": {"noise": "gumbel", "hard": True, "estimator": "straight_through"},
    "det-st": {"noise": "none", "hard": True, "estimator": "straight_through"},
    "gumbel-rao": {"noise": "gumbel", "hard": True, "estimator": "gumbel_rao"},
    "reinmax": {"noise": "gumbel", "hard": True, "estimator": "reinmax"},
}
BASELINES = ("none", "moving average", "leave-one-out", "soft output")
NOISY_LOG_PROB = "none, log P[idx]"
REINMAX_LOWEST_TAU = 1.0
_CHUNK = 2_000_000
_STREAM_SHARE = 40


@dataclass(frozen=True)
class Setting:
    """One estimator: an arm at a temperature, or the score function with a baseline.

    Attributes:
        arm: a name of ``PATHWISE``, or ``"reinforce"``.
        tau: temperature; None for the score function, whose samples and gradients do not depend on it.
        samples: of ``gumbel-rao``: noise samples for one choice; of ``reinforce``: choices averaged in one estimate.
        baseline: of ``reinforce``.
    """

    arm: str
    tau: float | None = None
    samples: int = 1
    baseline: str | None = None

    def __str__(self) -> str:
        baseline = "" if self.baseline is None else f", baseline {self.baseline}"
        samples = f", K={self.samples}" if self.arm in ("gumbel-rao", "reinforce") else ""
        return self.arm + samples + baseline + ("" if self.tau is None else f", tau={self.tau:g}")


def pathwise_settings(taus: Sequence[float], samples: Sequence[int]) -> list[Setting]:
    """Every pathwise estimator at every temperature it is meant for."""
    settings = []
    for arm in PATHWISE:
        for tau in taus:
            if arm == "gumbel-rao":
                settings += [Setting(arm, tau, count) for count in samples]
            elif arm != "reinmax" or tau >= REINMAX_LOWEST_TAU:
                settings.append(Setting(arm, tau))
    return settings


def attend(problem: Problem, scores: Tensor, seed: int, **settings: Any) -> tuple[Tensor, Tensor | None]:
    """Output of the last row and the summed log-probability of the choices.

    Args:
        problem: the problem.
        scores: (rows, count, n): one sample of every row's attention for each of ``count``.
        seed: of the noise; each row draws its own.
        settings: of the choice.

    Returns:
        (count, d), and (count,) for a hard choice with Gumbel noise, else None.
    """
    if problem.of_weights:
        info = ga.gumbel_softmax_with_info(scores[0], seed=seed, **settings)
        return info.weights, info.log_prob
    output, log_prob = None, None
    eye = torch.eye(problem.keys, dtype=scores.dtype)[None, None]
    for row, values in enumerate(problem.values.to(scores.dtype)):
        query = scores[row]
        if output is not None:
            assert problem.coupling is not None
            query = query + output @ problem.coupling.to(query).T
        found = ga.gumbel_attention_with_info(
            query[None, None], eye, values[None, None], scale=1.0, seed=seed + row, **settings
        )
        output = found.output[0, 0]
        if found.log_prob is not None:
            own = found.log_prob[0, 0]
            log_prob = own if log_prob is None else log_prob + own
    assert output is not None
    return output, log_prob


def pathwise_estimates(problem: Problem, setting: Setting, count: int, seed: int) -> dict[str, Tensor]:
    """Independent gradient estimates (count, rows * n) for every loss; all losses share the samples.

    One single estimate where there is no noise.
    """
    assert setting.tau is not None
    arguments = {"tau": setting.tau, **PATHWISE[setting.arm]}
    if setting.arm == "gumbel-rao":
        arguments["samples"] = setting.samples
    if arguments["noise"] == "none":
        count = 1
    parts: dict[str, list[Tensor]] = {name: [] for name in problem.losses}
    for rows, chunk_seed in _chunks(count, problem.keys * setting.samples, 1, seed):
        scores = _repeat(problem, rows)
        output, _ = attend(problem, scores, chunk_seed, **arguments)
        for name, loss in problem.losses.items():
            (gradient,) = torch.autograd.grad(loss(output).sum(), scores, retain_graph=True)
            parts[name].append(gradient.movedim(1, 0).flatten(1))
    return {name: torch.cat(chunks) for name, chunks in parts.items()}


def score_function_estimates(
    problem: Problem, samples: Sequence[int], count: int, seed: int, tau: float = 1.0
) -> dict[tuple[str, str, int], Tensor]:
    """Score-function gradient estimates by loss, baseline and number of samples in an estimate.

    ``count`` choices are drawn once, and grouped into estimates of K each for every baseline and every K. One more
    has no baseline and, as a control, the wrong log-probability: that of the choice under the noisy weights.

    Args:
        problem: the problem.
        samples: the numbers K.
        count: choices in all; what is left over after whole groups of each K is dropped. A moving average takes one
            step after the other and stops after a fortieth of them.
        seed: of the noise.
        tau: temperature, which has no effect except on the wrong log-probability.
    """
    parts: dict[tuple[str, str, int], list[Tensor]] = {}
    averages: dict[tuple[str, int], Any] = {}
    for rows, chunk_seed in _chunks(count, problem.keys, max(samples), seed):
        scores = _repeat(problem, rows)
        output, log_prob = attend(problem, scores, chunk_seed, tau=tau, hard=True, estimator=SCORE_FUNCTION)
        soft, _ = attend(problem, _repeat(problem, 1), 0, noise="none")
        wrong = _noisy_log_prob(problem, scores, chunk_seed, tau)
        assert log_prob is not None
        for name, loss in problem.losses.items():
            losses = loss(output).detach()
            constants = {"none": 0.0, "soft output": float(loss(soft.detach()))}
            for k in samples:
                grouped = losses.reshape(k, -1)
                baselines: dict[str, Any] = dict(constants)
                if k > 1:
                    baselines["leave-one-out"] = ga.leave_one_out(grouped)
                average = averages.setdefault((name, k), ga.MovingAverageBaseline(decay=0.99))
                done = sum(map(len, parts.get((name, "moving average", k), ())))
                steps = min(grouped.shape[1], count // _STREAM_SHARE - done)
                if steps > 0:
                    baselines["moving average"] = _stream(average, grouped[:, :steps])
                if k == 1 and wrong is not None:
                    baselines[NOISY_LOG_PROB] = 0.0
                for kind, baseline in baselines.items():
                    used = wrong if kind == NOISY_LOG_PROB else log_prob
                    keep = steps if kind == "moving average" else grouped.shape[1]
                    value = ga.score_function_loss(grouped[:, :keep], used.reshape(k, -1)[:, :keep], baseline)
                    (gradient,) = torch.autograd.grad(value, scores, retain_graph=True)
                    singles = gradient.movedim(1, 0).flatten(1).reshape(k, grouped.shape[1], -1)[:, :keep]
                    parts.setdefault((name, kind, k), []).append(singles.sum(0) * keep)
    return {key: torch.cat(chunks) for key, chunks in parts.items()}


def _stream(average: Any, losses: Tensor) -> Tensor:
    """The moving average before each step, (steps,), where step t sees ``losses[:, t]``."""
    before = []
    for step in losses.unbind(1):
        before.append(float(average.value))
        average.update(step)
    return losses.new_tensor(before)


def _noisy_log_prob(problem: Problem, scores: Tensor, seed: int, tau: float) -> Tensor | None:
    """log P[argmax P] with P = softmax((S + G) / tau) for the same noise; for one row of weights only."""
    if not problem.of_weights:
        return None
    return ga.gumbel_softmax(scores[0], tau, seed=seed).amax(-1).log()


def _repeat(problem: Problem, count: int) -> Tensor:
    """The scores once for each sample, (rows, count, n), float32, as a leaf that collects gradients."""
    repeated = problem.scores.float()[:, None].expand(-1, count, -1)
    return repeated.contiguous().requires_grad_()


def _chunks(count: int, width: int, multiple: int, seed: int) -> Iterator[tuple[int, int]]:
    """Sizes, multiples of ``multiple``, and noise seeds of the calls that make up ``count`` samples."""
    size = max(1, _CHUNK // (width * multiple)) * multiple
    left = count // multiple * multiple
    number = 0
    while left > 0:
        yield min(size, left), (seed << 16) + 4 * number
        left -= min(size, left)
        number += 1
