"""Gradient quality end to end in small, its relations with controls, the library's estimators on small problems."""

import dataclasses
import json

import pytest
import torch
from plain_estimators import gumbel_rao, one_hot, reinmax, relaxed, straight_through

import gradient_quality
import gumbel_attention as ga
from harness import gradient_limits as limits
from harness import gradient_relations as relations
from harness.gradient_problems import exact_gradient, one_row, pair_expectation, straight_through_limit, two_rows
from harness.gradient_samples import Setting, pathwise_estimates, score_function_estimates
from harness.gradient_statistics import against_each_other, against_truth, assess
from harness.gradient_study import Study
from harness.gradient_verdicts import Relation, verdict

COUNT = 20_000
CONTROL = Setting("gumbel-rao", 0.7, 3)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradient_quality") / "new" / "folder"
    study, found = gradient_quality.main(["--quick", "--output_dir", str(folder)])
    return folder, study, found


def slope_of(problem, loss):
    """f'(weights) of a problem of one row, through its values."""
    values = problem.values[0]

    def slope(weights):
        at = (weights @ values).requires_grad_()
        return torch.autograd.grad(problem.losses[loss](at).sum(), at)[0] @ values.T

    return slope


# --- the script ---------------------------------------------------------------------------------------------------


def test_small_run_writes_results_table_and_plots(small_run):
    folder, study, found = small_run
    for name in ("bias.png", "variance.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert results["versions"]["torch"] == torch.__version__
    assert results["settings"]["quick"] is True
    assert len(results["rows"]) == sum(map(len, study.results.values()))
    assert {len(row) for row in results["rows"]} == {len(results["columns"])}
    assert [entry["name"] for entry in results["relations"]] == [relation.name for relation in found]
    table = (folder / "table.md").read_text()
    assert all(f"{relation.name}: **{relation.verdict}**" in table for relation in found)
    assert "gumbel-rao, K=10, tau=0.5" in table


def test_what_must_hold_holds_in_the_small_run(small_run):
    """False-alarm rate at most 1e-6 for each; those with a control are undecided if it is not caught."""
    _, study, found = small_run
    sure = (
        relations.score_function_is_unbiased,
        relations.gumbel_rao_agrees,
        relations.reinmax_is_the_limit,
        relations.variances_agree_with_enumeration,
        relations.leave_one_out_lowers_variance_away_from_zero,
        limits.samples_agree_with_quadrature,
    )
    checked = [relation(study) for relation in sure]
    assert [relation.verdict for relation in checked] == ["holds"] * len(sure)
    assert set(checked) <= set(found)
    refuted = [relation.name for relation in found if relation.verdict == "does not hold"]
    assert all("whatever the loss" in name for name in refuted)


def test_a_run_repeats_and_its_seed_counts():
    problem = one_row(3, 0)
    for setting in (Setting("gumbel-rao", 0.5, 4), Setting("reinmax", 1.0)):
        first, again, other = (pathwise_estimates(problem, setting, 50, seed) for seed in (1, 1, 2))
        assert torch.equal(first["mlp"], again["mlp"])
        assert not torch.equal(first["mlp"], other["mlp"])


def test_samples_in_chunks_are_all_different(monkeypatch):
    monkeypatch.setattr("harness.gradient_samples._CHUNK", 90)
    estimates = pathwise_estimates(two_rows(3, 0), Setting("gumbel-soft", 1.0), 100, 5)["linear"]
    assert len(estimates) == len(estimates.unique(dim=0)) == 100


def test_too_few_samples_are_refused(capsys):
    with pytest.raises(SystemExit):
        gradient_quality.parse_args(["--samples", "999"])
    assert "expected at least 1000, got 999" in capsys.readouterr().err


# --- every relation notices its opposite --------------------------------------------------------------------------


def tampered(study: Study, arm: str, source, **fields) -> Study:
    """The study with another setting's results under the name of ``arm``."""
    changed = {}
    for case, results in study.results.items():
        changed[case] = dict(results)
        for setting in results:
            if setting.arm == arm and all(getattr(setting, name) == value for name, value in fields.items()):
                changed[case][setting] = results.get(source(setting), results[setting])
    return Study(study.plan, study.problems, changed)


def in_place_of(**fields):
    return lambda setting: dataclasses.replace(setting, **fields)


CONTROLS = {
    "wrong log_prob": (
        relations.score_function_is_unbiased,
        {"arm": "reinforce", "baseline": "none", "samples": 1, "source": in_place_of(baseline="none, log P[idx]")},
    ),
    "relaxed gradient as Gumbel-Rao": (
        relations.gumbel_rao_agrees,
        {"arm": "gumbel-rao", "source": in_place_of(arm="gumbel-soft", samples=1)},
    ),
    "ReinMax at tau=2 as at tau=1": (
        relations.reinmax_is_the_limit,
        {"arm": "reinmax", "tau": 1.0, "source": in_place_of(tau=2.0)},
    ),
    "straight-through at another tau": (
        limits.samples_agree_with_quadrature,
        {"arm": "gumbel-st", "tau": 0.5, "source": in_place_of(tau=1.0)},
    ),
    "one choice counted as ten": (
        relations.variances_agree_with_enumeration,
        {"arm": "reinforce", "baseline": "none", "samples": 10, "source": in_place_of(samples=1)},
    ),
    "variances the other way round": (
        limits.relaxed_variance_rises,
        {"arm": "gumbel-soft", "tau": 0.1, "source": in_place_of(tau=2.0)},
    ),
    "ReinMax at tau=2 as straight-through's rival at tau=1": (
        lambda study: relations.reinmax_lowers_bias(study)[0],
        {"arm": "reinmax", "tau": 1.0, "source": in_place_of(tau=2.0)},
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_relation_fails_where_it_should(small_run, name):
    _, study, _ = small_run
    relation, change = CONTROLS[name]
    assert relation(study).verdict != "does not hold"
    assert relation(tampered(study, **change)).verdict == "does not hold"


def test_a_relation_in_words():
    assert str(Relation("a is b", verdict(False, True), "1 = 1")) == "a is b: holds; 1 = 1"
    assert (verdict(True, True), verdict(False, False)) == ("does not hold", "undecided")


# --- the library's estimators against a second implementation ----------------------------------------------------


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_estimators_agree_with_their_formulas(tau):
    """False-alarm rate 1e-6 for all of them; Gumbel-Rao that forgets the choice is the control."""
    problem = one_row(4, 3)
    scores = problem.scores.expand(COUNT, -1)
    generator = torch.Generator().manual_seed(17)
    choice = torch.multinomial(scores[0].softmax(-1), COUNT, replacement=True, generator=generator)
    formulas = {
        Setting("gumbel-soft", tau): lambda slope: relaxed(scores, slope, tau, generator),
        Setting("gumbel-st", tau): lambda slope: straight_through(scores, slope, tau, generator),
        Setting("gumbel-rao", tau, 5): lambda slope: gumbel_rao(scores, slope, tau, generator, 5),
        Setting("reinmax", tau): lambda slope: reinmax(scores, slope, tau, choice),
        CONTROL: lambda slope: gumbel_rao(scores, slope, CONTROL.tau, generator, 3, given_choice=False),
    }
    if tau < 1:
        del formulas[Setting("reinmax", tau)]
    pairs, controls = [], []
    for setting, formula in formulas.items():
        mine = pathwise_estimates(problem, setting, COUNT, 23)
        for name, loss in problem.losses.items():
            truth = exact_gradient(problem, loss)
            pair = (assess(mine[name], truth), assess(formula(slope_of(problem, name)), truth))
            (controls if setting is CONTROL else pairs).append(pair)
    assert not any(item.differs for item in against_each_other(pairs))
    assert any(item.differs for item in against_each_other(controls))


def test_gumbel_rao_with_one_sample_is_straight_through_to_the_bit():
    for problem in (one_row(5, 0), one_row(3, 0, of_weights=True), two_rows(3, 0)):
        mine, other = (pathwise_estimates(problem, Setting(arm, 0.7), 200, 9) for arm in ("gumbel-rao", "gumbel-st"))
        assert all(torch.equal(mine[loss], other[loss]) for loss in problem.losses)


def test_score_function_does_not_depend_on_tau():
    problem = two_rows(3, 0)
    first, second = (score_function_estimates(problem, (1, 10), 400, 9, tau=tau) for tau in (0.1, 5.0))
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_estimators_without_noise_are_single_numbers():
    problem = one_row(4, 1)
    for arm, tau in (("softmax-tau", 0.5), ("det-st", 0.5)):
        estimates = pathwise_estimates(problem, Setting(arm, tau), 1000, 0)["quadratic"]
        p = (problem.scores / tau).softmax(-1)
        weights = p if arm == "softmax-tau" else one_hot(p.argmax(-1), 4)
        slope = slope_of(problem, "quadratic")(weights)
        expected = p * (slope - (p * slope).sum(-1, keepdim=True)) / tau
        torch.testing.assert_close(estimates.double(), expected, rtol=1e-5, atol=1e-6)


def test_straight_through_near_its_limit():
    """tau = 0.05: the sampled bias of cubic and MLP losses is the limit's, those of linear and quadratic ones vanish.

    Against the closed-form limit the means may differ by the bias of the small tau, so their distance from it is
    compared with their distance from the truth, both far above what chance gives.
    """
    problem = one_row(4, 0)
    estimates = pathwise_estimates(problem, Setting("gumbel-rao", 0.05, 20), COUNT, 4)
    for name, loss in problem.losses.items():
        truth, limit = exact_gradient(problem, loss), straight_through_limit(problem, loss)
        from_truth, from_limit = assess(estimates[name], truth), assess(estimates[name], limit)
        if name in limits.EXACT_LOSSES:
            assert from_truth.bias - from_truth.radius < 0.05 * from_truth.scale
        else:
            assert from_truth.bias_above(0.5 * from_truth.scale)
            assert from_limit.closer_than(from_truth)


def test_relaxation_and_straight_through_differ_only_where_the_loss_is_curved():
    problem = one_row(2, 0)
    for name, loss in problem.losses.items():
        soft, hard = (pair_expectation(problem, loss, 0.5, hard=hard) for hard in (False, True))
        assert torch.allclose(soft, hard) == (name == "linear")


def test_straight_through_bias_is_not_monotone_in_tau_for_a_cubic_loss():
    problem = one_row(2, 0)
    loss = problem.losses["cubic"]
    truth = exact_gradient(problem, loss)
    bias = [
        float((pair_expectation(problem, loss, tau, hard=True) - truth).norm() / truth.norm()) for tau in (0.01, 1, 5)
    ]
    assert bias[0] > 0.7
    assert bias[1] < 0.1
    assert bias[2] > 0.6


def test_score_function_is_unbiased_and_a_baseline_that_sees_its_own_choice_is_not(monkeypatch):
    """False-alarm rate 1e-6 for all settings; the control leaves nothing out, which shortens the gradient by 1/K."""
    problem = one_row(4, 0)
    truth = {name: exact_gradient(problem, loss) for name, loss in problem.losses.items()}
    estimates = score_function_estimates(problem, (1, 10), 5 * COUNT, 3)
    assert len(estimates) == 4 * (3 + 4)
    good = [assess(values, truth[name]) for (name, _, _), values in estimates.items()]
    assert not any(item.differs for item in against_truth(good))
    monkeypatch.setattr(ga, "leave_one_out", lambda losses: losses.mean(0))
    estimates = score_function_estimates(problem, (10,), 5 * COUNT, 3)
    biased = [assess(estimates[name, "leave-one-out", 10], truth[name]) for name in truth]
    assert all(item.differs for item in against_truth([*good, *biased])[len(good) :])
