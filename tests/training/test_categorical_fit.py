"""Fitting one categorical variable: losses against enumeration, gradients, and the study end to end in small."""

import itertools
import json
import math

import pytest
import torch
from scipy import stats
from torch.nn import functional as F

import categorical_fit
from categorical_fit import TASKS, error_of, loss_of, make_targets, median, steps_to, table
from harness.sampling import ARMS, Objective

SMALL = ["--seeds", "2", "--steps", "12", "--hold", "2", "--pairs", "3", "--classes", "4", "--learning_rates", "0.1"]
SMALL_ARMS = ["gumbel-soft", "gumbel-rao", "reinforce-average", "reinforce-soft"]
FALSE_ALARM = 1e-6


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("categorical_fit") / "new"
    return folder, categorical_fit.main([*SMALL, "--arms", *SMALL_ARMS, "--output_dir", str(folder)])


def expected_loss(task: str, theta: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean of the task's loss over the nine pairs of hard samples of three classes."""
    q, one_hot = theta.softmax(-1), torch.eye(3)
    terms = [
        q[i] * q[j] * loss_of(task, torch.stack([one_hot[i], one_hot[j]]), target)
        for i, j in itertools.product(range(3), repeat=2)
    ]
    return torch.stack(terms).sum()


def test_expected_losses_are_what_the_script_says():
    theta, target = torch.tensor([0.3, -0.5, 1.0]), torch.tensor([0.2, 0.5, 0.3])
    q = theta.softmax(-1)
    reward = (q * target).sum()
    torch.testing.assert_close(expected_loss("match", theta, target), (q - target).square().sum())
    torch.testing.assert_close(expected_loss("reward", theta, target), -reward)
    torch.testing.assert_close(expected_loss("curved", theta, target), 1 + target.square().sum() - 2 * reward)


def test_match_is_least_at_the_target_and_curved_between_the_classes():
    target = torch.tensor([0.2, 0.5, 0.3])
    for seed in range(20):
        theta = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        assert expected_loss("match", theta, target) > expected_loss("match", target.log(), target) - 1e-6
    assert expected_loss("match", target.log(), target) == pytest.approx(0, abs=1e-6)
    assert loss_of("curved", torch.stack([target, target]), target) == 0


def test_errors_are_zero_at_the_optimum_and_one_where_nothing_is_gained():
    target = torch.tensor([0.1, 0.6, 0.3])
    sure = torch.tensor([-200.0, 0.0, -200.0])
    assert error_of("match", target.log(), target) == pytest.approx(0, abs=1e-6)
    assert error_of("match", sure, target) == pytest.approx(0.4)
    for task in ("reward", "curved"):
        assert error_of(task, sure, target) == pytest.approx(0, abs=1e-6)
        assert error_of(task, torch.zeros(3), target) == pytest.approx(1)


def largest_z(name: str, task: str, copies: int) -> float:
    """Largest |z| over three logits of the arm's mean gradient against the enumerated one, over independent copies."""
    arm, target = ARMS[name], torch.tensor([0.2, 0.7, 0.1])
    theta = torch.tensor([0.3, -0.5, 1.0], requires_grad=True)
    (exact,) = torch.autograd.grad(expected_loss(task, theta, target), theta)
    torch.manual_seed(1)
    rows = theta.detach().repeat(copies, 1).requires_grad_()
    pairs = 4
    columns = target.expand(copies, 3)
    objective = Objective(arm)
    for _ in range(2 if arm.baseline == "average" else 1):  # the second time the moving average has a value
        sample = arm.draw(rows.unsqueeze(1).expand(pairs, -1, 2, -1), 0.5)
        soft = loss_of(task, rows.detach().softmax(-1).unsqueeze(1).expand(-1, 2, -1), columns)
        loss = objective(loss_of(task, sample.weights, columns), sample, lambda soft=soft: soft)
    grads = torch.autograd.grad(loss * copies, rows)[0].double()
    z = (grads.mean(0) - exact.double()) / (grads.std(0) / math.sqrt(copies) + 1e-7)
    return z.abs().max().item()


@pytest.mark.parametrize("name", ["reinforce", "reinforce-average", "reinforce-loo", "reinforce-soft"])
@pytest.mark.parametrize("task", ["match", "curved"])
def test_score_function_gradients_are_unbiased(name, task):
    """Three means in one test: |z| stays below the limit but for one in a million runs (Bonferroni, normal limit)."""
    assert largest_z(name, task, 10_000) < stats.norm.isf(FALSE_ALARM / 6)


def test_softmax_st_is_unbiased_where_the_loss_is_linear_in_each_sample():
    assert largest_z("softmax-st", "match", 10_000) < stats.norm.isf(FALSE_ALARM / 6)


@pytest.mark.parametrize("name", ["softmax-st", "gumbel-st", "gumbel-soft", "gumbel-rao"])
def test_the_bias_of_the_others_is_seen(name):
    """The control of the two tests above: a curved loss shows the bias of every arm that linearises it once."""
    assert largest_z(name, "curved", 10_000) > stats.norm.isf(FALSE_ALARM / 6)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_learns_the_linear_reward(name):
    args = categorical_fit.parse_args(["--steps", "40", "--classes", "3", "--learning_rates", "0.1", "0.2"])
    errors = categorical_fit.fit(ARMS[name], "reward", [0, 1, 2], args)
    assert errors.shape == (40, 2, 3)
    torch.testing.assert_close(errors[0], torch.ones(2, 3))
    assert errors[-1].max() < 0.7
    assert errors[-1, 1].mean() < errors[-1, 0].mean()


def test_fits_are_repeatable_and_seeds_differ():
    args = categorical_fit.parse_args([*SMALL, "--learning_rates", "0.1", "0.3"])
    first, again = (categorical_fit.fit(ARMS["gumbel-st"], "match", [3, 4], args) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[:, :, 0], first[:, :, 1])
    other = categorical_fit.fit(ARMS["gumbel-st"], "match", [5, 4], args)
    assert not torch.equal(first, other)


def test_columns_do_not_touch_each_other():
    """Without noise a run gives to the bit what it gives alone."""
    args = categorical_fit.parse_args([*SMALL, "--learning_rates", "0.1", "0.3"])
    together = categorical_fit.fit(ARMS["det-st"], "curved", [3, 4], args)
    args.learning_rates = [0.3]
    torch.testing.assert_close(categorical_fit.fit(ARMS["det-st"], "curved", [4], args)[:, 0, 0], together[:, 1, 1])


def test_targets_are_distributions_that_differ_by_seed():
    targets = make_targets(range(2000), 4)
    torch.testing.assert_close(targets.sum(-1), torch.ones(2000))
    assert targets.min() >= 0
    # Dirichlet(1) over four classes: mean 1/4 and variance 3/80; 5.5 standard errors
    assert (targets.mean(0) - 0.25).abs().max() < 5.5 * math.sqrt(3 / 80 / 2000)
    assert torch.equal(make_targets([7], 4)[0], targets[7])


def test_steps_to_an_accuracy_that_holds():
    errors = [0.9, 0.05, 0.9, 0.05, 0.04, 0.03, 0.9]
    assert steps_to(errors, 0.05, 1) == 1
    assert steps_to(errors, 0.05, 3) == 3
    assert steps_to(errors, 0.05, 4) is None
    assert median([3, math.inf, 1]) == 3
    assert math.isinf(median([math.inf, 3]))


def test_run_writes_json_and_table(small_run):
    folder, results = small_run
    written = json.loads((folder / "categorical_fit.json").read_text())
    assert written == results
    assert (folder / "table.md").read_text() == table(written)
    assert [(row["task"], row["arm"]) for row in written["rows"]] == list(itertools.product(TASKS, SMALL_ARMS))
    assert all(len(row["seeds"]) == 2 for row in written["rows"])


def result_of(seeds, name="gumbel-st", rate=0.1):
    rows = [{"steps": steps, "error": error} for steps, error in seeds]
    return {"task": "match", "arm": name, "learning_rate": rate, "seeds": rows}


def test_table_says_what_was_not_reached(small_run):
    results = {**small_run[1], "settings": {**small_run[1]["settings"], "tasks": ["match"]}}
    results["rows"] = [
        result_of([(None, 0.5), (None, 0.25), (None, 0.75)]),
        result_of([(10, 0.125), (None, 0.25), (40, 0.0)], "reinmax"),
    ]
    lines = [line for line in table(results).splitlines() if line.startswith("| `")]
    assert lines == [
        "| `reinmax` | 0.1 | 40 (10-not reached) | 2 of 3 | 0.125 (0.000-0.250) |",
        "| `gumbel-st` | 0.1 | not reached | 0 of 3 | 0.500 (0.250-0.750) |",
    ]


def test_the_learning_rate_is_chosen_on_other_seeds(monkeypatch):
    args = categorical_fit.parse_args(["--seeds", "2", "--steps", "10", "--hold", "1", "--learning_rates", "1", "2"])
    errors = torch.ones(10, 2, 4)
    errors[5:, 1, 2:] = 0  # the second rate gets there on the tuning seeds,
    errors[2:, 0, :2] = 0  # the first on the reported ones
    monkeypatch.setattr(categorical_fit, "fit", lambda arm, task, seeds, args: errors)
    row = categorical_fit.study(ARMS["reinmax"], "match", args)
    assert row["learning_rate"] == 2
    assert row["seeds"] == [{"steps": None, "error": 1.0}] * 2


def test_det_st_stays_on_its_argmax():
    logits = torch.tensor([[0.0, 1.0, 0.5], [2.0, 1.0, 0.5]])
    weights = ARMS["det-st"].draw(logits.unsqueeze(1).expand(5, -1, 2, -1), 0.5).weights
    assert torch.equal(weights, F.one_hot(torch.tensor([1, 0]), 3).float().unsqueeze(1).expand(5, -1, 2, -1))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "matching"], "--tasks must name each of match, reward, curved at most once, got matching"),
        (["--arms", "st"], "unknown arm 'st'; there are gumbel-soft"),
        (["--classes", "1"], "--classes must be at least 2, got 1"),
        (["--pairs", "1"], "--pairs must be at least 2, got 1"),
        (["--hold", "900"], "--hold must be at most --steps 700, got 900"),
        (["--accuracy", "1"], "--accuracy must be between 0 and 1, got 1.0"),
        (["--tau", "0"], "--tau must be between 0 and inf, got 0.0"),
        (["--learning_rates", "-1"], "--learning_rates must be finite, > 0 and differ from each other"),
    ],
)
def test_bad_arguments_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        categorical_fit.parse_args(argv)
    assert message in capsys.readouterr().err
