"""What becomes of the relaxation's and of straight-through's bias as tau -> 0: does it hold, by which numbers?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

from harness.gradient_problems import pair_expectation
from harness.gradient_statistics import Quality, against_truth, variances_compared
from harness.gradient_study import Study, by_arm
from harness.gradient_verdicts import Relation, by_tau, limit_bias, listed, pair_bias, share, spread_of, verdict, worst

SMALL_TAU = 0.001
VISIBLE = 0.05
EXACT_LOSSES = ("linear", "quadratic")


def relaxed_bias_vanishes(study: Study) -> Relation:
    """The smallest tau's bias is below another tau's; for two keys by quadrature to smaller tau."""
    falls, smallest = [], []
    for _, _, results in study.cases():
        at = by_tau(results, "gumbel-soft")
        first = at[min(at)]
        falls.append(any(first.closer_than(quality) for quality in at.values()))
        smallest.append(first.relative_bias)
    exact = {tau: max(pair_bias(study, tau, hard=False).values()) for tau in (1.0, 0.1, 0.01, SMALL_TAU)}
    shown = ", ".join(f"{value:.1g} at tau={tau:g}" for tau, value in exact.items())
    return Relation(
        "the relaxation's bias tends to 0 as tau -> 0",
        verdict(exact[SMALL_TAU] > 0.01, all(falls)),
        f"relative bias at tau={study.plan.taus[0]:g} at most {max(smallest):.2g}, below that of a larger tau in "
        f"{share(falls)} cases; n=2 by quadrature, worst loss: {shown}",
    )


def relaxed_variance_rises(study: Study) -> Relation:
    """From each tau to the next smaller one."""
    steps, ends = [], []
    for _, _, results in study.cases():
        at = by_tau(results, "gumbel-soft")
        steps += [(at[low], at[high]) for low, high in pairwise(sorted(at))]
        ends.append(at[min(at)].variance / at[max(at)].variance)
    found, taus = variances_compared(steps), study.plan.taus
    rising = [item.higher for item in found]
    return Relation(
        "the relaxation's variance rises as tau falls",
        verdict(any(item.lower for item in found), sum(rising) > 0.9 * len(rising)),
        f"beyond chance in {share(rising)} steps between neighbouring tau; tau={taus[0]:g} over tau={taus[-1]:g}: "
        f"{min(ends):.3g} to {max(ends):.3g} times",
    )


def straight_through_exact_in_the_limit(study: Study) -> Relation:
    """Linear and quadratic losses of a single row."""
    return _limit(study, EXACT_LOSSES, exact=True)


def straight_through_biased_in_the_limit(study: Study) -> Relation:
    """The other losses of a single row."""
    others = tuple(name for name in study.problems[0].losses if name not in EXACT_LOSSES)
    return _limit(study, others, exact=False)


def _limit(study: Study, losses: Sequence[str], *, exact: bool) -> Relation:
    limits, sampled, agrees = {}, [], []
    for problem, loss, results in study.cases():
        if loss in losses and problem.rows == 1:
            limits[problem.name, loss] = limit_bias(problem, loss)
            at = by_tau(results, "gumbel-st")
            first = at[min(at)]
            falls = any(first.closer_than(quality) for quality in at.values())
            sampled.append(falls if exact else first.bias_above(VISIBLE * first.scale))
            if problem.keys == 2:
                agrees.append(abs(pair_bias(study, SMALL_TAU, hard=True)[loss] - limits[problem.name, loss]))
    closed = [value < 1e-12 if exact else value > VISIBLE for value in limits.values()]
    names = " and ".join(losses)
    tau = study.plan.taus[0]
    if exact:
        name = f"straight-through's bias tends to 0 for {names} losses of one row"
        numbers = (
            f"closed-form limit at most {max(limits.values()):.1g}; sampled at tau={tau:g} below that of a larger tau"
        )
    else:
        name = f"straight-through's bias has a limit other than 0 for {names} losses of one row"
        values = ", ".join(f"{loss} {spread_of(v for (_, k), v in limits.items() if k == loss)}" for loss in losses)
        numbers = f"relative bias in the limit, closed form: {values}; sampled at tau={tau:g} above {VISIBLE:g}"
    quadrature = f"n=2 by quadrature at tau={SMALL_TAU:g} within {max(agrees):.1g} of that"
    return Relation(
        name,
        verdict(not all(closed) or max(agrees) > 0.02, all(sampled)),
        f"{numbers} in {share(sampled)} cases; {quadrature}",
    )


def straight_through_biased_when_stacked(study: Study) -> Relation:
    """The gradient that the second row hands down is not linear, whatever the loss."""
    limits, above = {}, []
    for problem, loss, results in study.cases():
        if problem.rows == 2:
            limits[loss] = limit_bias(problem, loss)
            first = by_tau(results, "gumbel-st")[study.plan.taus[0]]
            above.append(first.bias_above(0.0))
    shown = ", ".join(f"{loss} {value:.2g}" for loss, value in limits.items())
    return Relation(
        "two stacked rows: straight-through's limit is biased for every loss, linear ones included",
        verdict(not all(value > VISIBLE for value in limits.values()), all(above)),
        f"relative bias in the limit, closed form: {shown}; sampled at tau={study.plan.taus[0]:g} above 0 in "
        f"{share(above)} cases",
    )


def straight_through_not_monotone(study: Study) -> Relation:
    """A tau in between whose bias lies below, or above, that of both a smaller and a larger one."""
    found, cases = [], 0
    for problem, loss, results in study.cases():
        cases += 1
        at = by_tau(results, "gumbel-st")
        depth = max(_turn(at, tau) for tau in sorted(at)[1:-1])
        if depth > 0:
            shown = ", ".join(f"{at[tau].relative_bias:.2f}" for tau in sorted(at))
            found.append((depth, f"{problem.name}, {loss} loss: {shown}"))
    example = f"; clearest in {max(found)[1]} at tau={listed(study.plan.taus)}" if found else ""
    return Relation(
        "straight-through's bias is not always monotone in tau",
        verdict(False, bool(found)),
        f"beyond chance in {len(found)} of {cases} cases{example}",
    )


def _turn(at: dict[float, Quality], tau: float) -> float:
    """How far, relatively, the bias at ``tau`` lies below or above biases on both sides of it; 0 if by chance."""
    here = at[tau]
    sides = [[at[t] for t in at if t < tau], [at[t] for t in at if t > tau]]
    dip = peak = 0.0
    if all(any(here.closer_than(other) for other in side) for side in sides):
        dip = min(max(other.bias for other in side) for side in sides) - here.bias
    if all(any(other.closer_than(here) for other in side) for side in sides):
        peak = here.bias - max(min(other.bias for other in side) for side in sides)
    return max(dip, peak) / here.scale


def samples_agree_with_quadrature(study: Study) -> Relation:
    """Two keys: relaxation, straight-through and Gumbel-Rao at every tau, against the integral."""
    qualities = []
    for problem, name, results in study.cases():
        if problem.keys != 2 or problem.rows != 1:
            continue
        for arm, hard in (("gumbel-soft", False), ("gumbel-st", True), ("gumbel-rao", True)):
            for setting, quality in by_arm(results, arm).items():
                assert setting.tau is not None
                exact = pair_expectation(problem, problem.losses[name], setting.tau, hard=hard)
                qualities.append(dataclasses.replace(quality, truth=exact))
    found = against_truth(qualities)
    return Relation(
        "n=2: sampled means agree with the integral over the noise",
        verdict(any(item.differs for item in found), True),
        f"{worst(found)} over {len(found)} settings",
    )
