"""Known relations between gradient estimators, each looked up in what was sampled: does it hold, by which numbers?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from harness import gradient_limits as limits
from harness.gradient_problems import (
    Problem,
    expected_loss,
    leave_one_out_variance,
    loss_spread,
    score_variance,
    straight_through_limit,
)
from harness.gradient_samples import BASELINES, NOISY_LOG_PROB, REINMAX_LOWEST_TAU, Setting
from harness.gradient_statistics import (
    Quality,
    against_each_other,
    against_truth,
    variances_against,
    variances_compared,
)
from harness.gradient_study import Study, by_arm
from harness.gradient_verdicts import Relation, by_tau, mildest, share, spread_of, verdict, worst

SPREADS = 10.0


def relations(study: Study) -> list[Relation]:
    """Every relation, in the order of the report."""
    return [
        score_function_is_unbiased(study),
        limits.relaxed_bias_vanishes(study),
        limits.relaxed_variance_rises(study),
        limits.straight_through_exact_in_the_limit(study),
        limits.straight_through_biased_in_the_limit(study),
        limits.straight_through_biased_when_stacked(study),
        limits.straight_through_not_monotone(study),
        gumbel_rao_agrees(study),
        gumbel_rao_lowers_variance(study),
        leave_one_out_lowers_variance(study),
        leave_one_out_lowers_variance_away_from_zero(study),
        variances_agree_with_enumeration(study),
        *reinmax_lowers_bias(study),
        reinmax_is_the_limit(study),
        limits.samples_agree_with_quadrature(study),
    ]


def score_function_is_unbiased(study: Study) -> Relation:
    """Every baseline, every K, every problem; and the wrong log-probability, which must fail."""
    qualities, controls = [], []
    for _, _, results in study.cases():
        for setting, quality in by_arm(results, "reinforce").items():
            if setting.baseline in BASELINES:
                qualities.append(quality)
            elif setting.baseline == NOISY_LOG_PROB:
                controls.append(quality)
    found, control = against_truth(qualities), against_truth(controls)
    caught = all(item.differs for item in control)
    return Relation(
        "the score function is unbiased with every baseline and every K",
        verdict(any(item.differs for item in found), caught),
        f"{worst(found)} over {len(found)} settings; control with the wrong log P[idx], which contains the noise: "
        f"{mildest(control)}, {'caught' if caught else 'NOT caught'} in {share([c.differs for c in control])}",
    )


def gumbel_rao_agrees(study: Study) -> Relation:
    """The same expectation as straight-through; ReinMax as the control, whose expectation is another."""
    pairs, controls = [], []
    for _, loss, results in study.cases():
        at = by_tau(results, "gumbel-st")
        pairs += [(quality, at[setting.tau]) for setting, quality in by_arm(results, "gumbel-rao").items()]
        if loss == "quadratic":
            controls += [(quality, at[tau]) for tau, quality in by_tau(results, "reinmax").items()]
    found, control = against_each_other(pairs), against_each_other(controls)
    caught = [item.differs for item in control]
    return Relation(
        "Gumbel-Rao has the expectation of straight-through",
        verdict(any(item.differs for item in found), any(caught)),
        f"{worst(found)} over {len(found)} pairs; control, ReinMax in its place (quadratic loss): differs in "
        f"{share(caught)}",
    )


def gumbel_rao_lowers_variance(study: Study) -> Relation:
    """For more than one sample."""
    ratios: dict[int, list[float]] = {}
    pairs = []
    for _, _, results in study.cases():
        at = by_tau(results, "gumbel-st")
        for setting, quality in by_arm(results, "gumbel-rao").items():
            other = at[setting.tau]
            ratios.setdefault(setting.samples, []).append(quality.variance / other.variance)
            if setting.samples > 1:
                pairs.append((quality, other))
    found = variances_compared(pairs)
    lower, higher = [item.lower for item in found], [item.higher for item in found]
    shown = ", ".join(f"K={k}: {spread_of(values)}" for k, values in ratios.items())
    return Relation(
        "Gumbel-Rao has a lower variance than straight-through",
        verdict(any(higher), 2 * sum(lower) > len(lower)),
        f"variance ratio over problems, losses and tau {shown}; for K > 1 beyond chance lower in {share(lower)}, "
        f"higher in {share(higher)}",
    )


def leave_one_out_lowers_variance(study: Study) -> Relation:
    """For the losses as they are. Not a theorem: with many samples it is the baseline E f against the baseline 0.

    The variance grows with the baseline's squared distance from E[f s^2] / E[s^2], s the score function; which of E f
    and 0 is nearer depends on the loss.
    """
    pairs, names = [], []
    for problem, loss, results in study.cases():
        for setting, quality in by_arm(results, "reinforce", baseline="leave-one-out").items():
            pairs.append((quality, results[dataclasses.replace(setting, baseline="none")]))
            names.append(f"{problem.name}, {loss}, K={setting.samples}")
    found = variances_compared(pairs)
    ratios = [mine.variance / plain.variance for mine, plain in pairs]
    lower = [item.lower for item in found]
    rest = [f"{name}: {ratio:.2f}" for name, ratio, item in zip(names, ratios, found, strict=True) if item.higher]
    listed = " (" + "; ".join(rest) + ")" if rest else ""
    return Relation(
        "leave-one-out has a lower variance than plain REINFORCE, whatever the loss (no theorem)",
        verdict(any(item.higher for item in found), all(lower)),
        f"ratio {spread_of(ratios)}, beyond chance lower in {share(lower)}, higher in "
        f"{share([item.higher for item in found])}{listed}",
    )


def leave_one_out_lowers_variance_away_from_zero(study: Study) -> Relation:
    """For the same losses plus a constant, which changes plain REINFORCE's variance and not leave-one-out's."""
    ratios, centred = [], []
    for problem, name, results in study.cases():
        loss = problem.losses[name]
        mean, spread = float(expected_loss(problem, loss, problem.scores)), loss_spread(problem, loss)
        for setting, quality in by_arm(results, "reinforce", baseline="leave-one-out").items():
            single = quality.variance * setting.samples
            below, at, above = (score_variance(problem, loss, mean + s * spread) for s in (-SPREADS, 0, SPREADS))
            ratios += [single / below, single / above]
            centred.append(single / at)
    return Relation(
        f"leave-one-out has a lower variance where the loss's mean lies {SPREADS:g} standard deviations from 0",
        verdict(max(ratios) >= 1, max(ratios) < 1),
        f"ratio {spread_of(ratios)} (plain variance by enumeration, either sign of the mean); control, a mean of 0: "
        f"{spread_of(centred)}",
    )


def variances_agree_with_enumeration(study: Study) -> Relation:
    """Plain REINFORCE's and leave-one-out's; with K counted as K + 1 as the control."""
    found, control = [], []
    for problem, name, results in study.cases():
        loss = problem.losses[name]
        for setting, quality in by_arm(results, "reinforce").items():
            k = setting.samples
            if setting.baseline == "none":
                exact = [score_variance(problem, loss) / count for count in (k, k + 1)]
            elif setting.baseline == "leave-one-out":
                exact = [leave_one_out_variance(problem, loss, count) for count in (k, k + 1)]
            else:
                continue
            for items, value in zip((found, control), exact, strict=True):
                items.append((quality, value))
    agree, caught = variances_against(found), [item.differs for item in variances_against(control)]
    return Relation(
        "sampled variances of plain REINFORCE and leave-one-out are those of the enumeration",
        verdict(any(item.differs for item in agree), any(caught)),
        f"{worst(agree)} over {len(agree)} settings; control, K + 1 in place of K: differs in {share(caught)}",
    )


def reinmax_lowers_bias(study: Study) -> list[Relation]:
    """Against straight-through at the same tau: where theory says so, then everywhere, one tau after the other."""
    exact = [case for case in study.cases() if case[0].rows == 1 and case[1] in limits.EXACT_LOSSES]
    found = [_reinmax_against(exact, 1.0, f" for {' and '.join(limits.EXACT_LOSSES)} losses of one row")]
    taus = [tau for tau in study.plan.taus if tau >= REINMAX_LOWEST_TAU]
    return found + [_reinmax_against(list(study.cases()), tau, ", whatever the loss") for tau in taus]


def _reinmax_against(cases: Sequence[tuple[Problem, str, dict[Setting, Quality]]], tau: float, where: str) -> Relation:
    lower, higher = [], []
    for problem, loss, results in cases:
        mine, other = results[Setting("reinmax", tau)], results[Setting("gumbel-st", tau)]
        lower.append(mine.closer_than(other))
        if other.closer_than(mine):
            higher.append(f"{problem.name}, {loss}: {mine.relative_bias:.2f} against {other.relative_bias:.2f}")
    listed = "; higher in " + "; ".join(higher) if higher else ""
    return Relation(
        f"ReinMax's bias is below straight-through's at tau={tau:g}{where}",
        verdict(bool(higher), any(lower)),
        f"beyond chance lower in {share(lower)} cases, undecided in {len(lower) - sum(lower) - len(higher)}{listed}",
    )


def reinmax_is_the_limit(study: Study) -> Relation:
    """At tau = 1 ReinMax expects what straight-through tends to; at a larger one, the control, it need not."""
    agree, control = [], []
    for problem, loss, results in study.cases():
        limit = straight_through_limit(problem, problem.losses[loss])
        for tau, quality in by_tau(results, "reinmax").items():
            (agree if tau == 1 else control).append(dataclasses.replace(quality, truth=limit))
    found, caught = against_truth(agree), [item.differs for item in against_truth(control)]
    return Relation(
        "ReinMax at tau=1 has the expectation that straight-through tends to as tau -> 0",
        verdict(any(item.differs for item in found), any(caught)),
        f"{worst(found)} over {len(found)} cases; control, ReinMax at larger tau: differs in {share(caught)}",
    )
