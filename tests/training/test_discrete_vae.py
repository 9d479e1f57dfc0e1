"""The discrete VAE: its bound against enumeration, its gradients, and the study end to end in small."""

import argparse
import copy
import itertools
import json
import math

import pytest
import torch
from scipy import stats
from torch.nn import functional as F

import discrete_vae
import gumbel_attention as ga
from harness.errors import UsageError
from harness.sampling import ARMS, Objective, choose_arms
from harness.vae import (
    Bound,
    CategoricalVAE,
    divergence_from_uniform,
    load_images,
    negative_elbo,
    relaxed_objective,
    split_images,
)
from harness.vae_report import choose_rate, compare, holm, paired, plot, report

SMALL = ["--seeds", "2", "--steps", "4", "--eval_every", "2", "--test_samples", "2", "--hidden", "16"]
SMALL += ["--learning_rates", "1e-3", "3e-3"]
SMALL_ARMS = ["gumbel-soft", "reinforce-average", "gumbel-rao"]
FALSE_ALARM = 1e-6
IMAGES = torch.tensor([[1.0, 0.0, 1.0, 1.0]])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discrete_vae") / "new"
    return folder, discrete_vae.main([*SMALL, "--arms", *SMALL_ARMS, "--output_dir", str(folder)])


def tiny_model() -> CategoricalVAE:
    torch.manual_seed(0)
    model = CategoricalVAE(pixels=4, hidden=8, variables=2, classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the nine outcomes differ
    return model


def enumerated(model: CategoricalVAE, logits: torch.Tensor):
    """Probability and reconstruction loss of each of the nine outcomes for the one image."""
    q = logits.softmax(-1)
    probabilities, losses = [], []
    for outcome in itertools.product(range(3), repeat=2):
        weights = F.one_hot(torch.tensor(outcome), 3).float()
        probabilities.append(q[0, outcome[0]] * q[1, outcome[1]])
        losses.append(model.reconstruction(weights, IMAGES[0]))
    return torch.stack(probabilities), torch.stack(losses)


def exact_elbo(model: CategoricalVAE) -> tuple[float, float, float]:
    """Reconstruction, its standard deviation over outcomes, and divergence, by enumeration in double precision."""
    with torch.no_grad():
        probabilities, losses = (x.double() for x in enumerated(model, model.encode(IMAGES)[0]))
    mean = (probabilities * losses).sum()
    spread = (probabilities * (losses - mean).square()).sum().sqrt()
    return mean.item(), spread.item(), (probabilities * (9 * probabilities).log()).sum().item()


def test_bound_is_the_enumerated_one():
    """Mean of n samples against the exact mean: |z| < 4.9 but for one in a million runs, by the normal limit."""
    model, samples = tiny_model(), 20_000
    mean, spread, divergence = exact_elbo(model)
    assert spread > 0.3
    limit = stats.norm.isf(FALSE_ALARM / 2) * spread / math.sqrt(samples)
    bound = negative_elbo(model, IMAGES, samples, seed=0)
    assert bound.reconstruction.shape == bound.divergence.shape == (1,)
    assert abs(bound.reconstruction.item() - mean) < limit
    assert bound.divergence.item() == pytest.approx(divergence, abs=1e-5)
    relaxed = relaxed_objective(model, IMAGES, samples, seed=0, tau=1.0) - divergence
    assert abs(relaxed - mean) > limit  # control: relaxed samples do not estimate the bound


def test_divergence_of_known_posteriors():
    sure = torch.full((5, 2, 4), -100.0)
    sure[..., 0] = 0
    assert divergence_from_uniform(sure).tolist() == pytest.approx([2 * math.log(4)] * 5)
    assert divergence_from_uniform(torch.zeros(5, 2, 4)).tolist() == pytest.approx([0.0] * 5, abs=1e-6)


def exact_gradient(model: CategoricalVAE, logits: torch.Tensor) -> torch.Tensor:
    probabilities, losses = enumerated(model, logits)
    return torch.autograd.grad((probabilities * losses).sum(), logits)[0]


def gradient_z(name: str, copies: int) -> float:
    """Largest |z| over the six logits of the arm's mean gradient against the exact one, over independent copies."""
    model, arm = tiny_model(), ARMS[name]
    logits = model.encode(IMAGES)[0].detach().requires_grad_()
    exact = exact_gradient(model, logits)
    torch.manual_seed(1)
    rows = logits.detach().repeat(copies, 1, 1).requires_grad_()
    sample = arm.draw(rows.expand(arm.samples, *rows.shape), 0.5)
    objective = Objective(arm)
    losses = model.reconstruction(sample.weights, IMAGES)
    objective(losses, sample)  # the moving average gets a first value
    grads = torch.autograd.grad(objective(losses, sample) * copies, rows)[0].flatten(1).double()
    z = (grads.mean(0) - exact.flatten()) / grads.std(0) * math.sqrt(copies)
    return z.abs().max().item()


@pytest.mark.parametrize("name", ["reinforce", "reinforce-average", "reinforce-loo"])
def test_score_function_arms_are_unbiased(name):
    """Six means in one test: |z| stays below the limit but for one in a million runs (Bonferroni).

    The moving average's first value is the mean of the same 20,000 losses, a dependence of order 1 / 20,000.
    """
    assert gradient_z(name, 20_000) < stats.norm.isf(FALSE_ALARM / 12)


@pytest.mark.parametrize("name", ["softmax-st", "gumbel-st", "gumbel-soft"])
def test_biased_arms_are_told_apart(name):
    """The control of the test above: its statistic sees the bias of these."""
    assert gradient_z(name, 20_000) > stats.norm.isf(FALSE_ALARM / 12)


@pytest.mark.parametrize("name", discrete_vae.KNOWN)
def test_arm_draws_and_trains(name):
    """Shapes of its samples, and a loss that falls by a third in 25 steps."""
    arm = ARMS[name]
    images = split_images(load_images(), 0).train[:64]
    torch.manual_seed(0)
    model, objective = CategoricalVAE(hidden=16), Objective(arm)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sample = arm.draw(model.encode(images).expand(arm.samples, 64, 20, 10), 0.9)
    assert sample.weights.shape == (arm.samples, 64, 20, 10)
    hard = name != "gumbel-soft"
    assert bool(((sample.weights == 0) | (sample.weights == 1)).all()) == hard
    torch.testing.assert_close(sample.weights.sum(-1), torch.ones(arm.samples, 64, 20))
    assert (sample.log_prob is None) == (arm.baseline is None)
    losses = []
    for _ in range(25):
        loss = discrete_vae.training_loss(model, objective, images, 0.9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert losses[-1] < losses[0] * 2 / 3


def test_softmax_st_is_a_hard_sample_with_the_gradient_of_softmax():
    logits = torch.randn(50, 2, 3, requires_grad=True)
    towards = torch.randn(50, 2, 3)
    (got,) = torch.autograd.grad((ARMS["softmax-st"].draw(logits, 0.3).weights * towards).sum(), logits)
    (expected,) = torch.autograd.grad((logits.softmax(-1) * towards).sum(), logits)
    torch.testing.assert_close(got, expected)


def test_data_are_binary_and_split_without_overlap():
    images = load_images()
    assert images.shape == (1797, 64)
    assert set(images.unique().tolist()) == {0.0, 1.0}
    numbered = torch.arange(100.0).unsqueeze(1)
    split = split_images(numbered, 3)
    assert [len(part) for part in split] == [60, 20, 20]
    assert sorted(torch.cat(split).flatten().tolist()) == numbered.flatten().tolist()
    assert not torch.equal(split.test, split_images(numbered, 4).test)


def test_batches_cover_the_data_anew_in_each_pass():
    rows = discrete_vae.batches(10, 4, seed=0)
    first, second, third = (next(rows).tolist() for _ in range(3))
    assert len(set(first + second)) == 8
    assert third != first
    assert next(discrete_vae.batches(3, 64, seed=0)).shape == (3,)


def test_temperature_is_jangs():
    tau = discrete_vae.temperature(argparse.Namespace(tau_end=0.5, steps=100))
    assert [tau(0), tau(25), tau(50), tau(99)] == pytest.approx([1.0, math.exp(-math.log(2) / 2), 0.5, 0.5])
    assert ARMS["reinmax"].tau(0.7) == 1.0
    assert ARMS["gumbel-st"].tau(0.7) == 0.7


def test_run_writes_json_table_and_plot(small_run):
    folder, results = small_run
    written = json.loads((folder / "discrete_vae.json").read_text())
    assert written == results
    assert (folder / "table.md").read_text() == report(written)
    assert (folder / "validation.png").read_bytes().startswith(b"\x89PNG")
    assert written["versions"]["gumbel_attention"] == ga.__version__
    assert len(written["runs"]) == len(SMALL_ARMS) * 3
    for row in written["runs"]:
        assert row["test"] == pytest.approx(row["reconstruction"] + row["divergence"], abs=2e-4)
        assert len(row["curve"]) == 2


def test_runs_are_repeatable_and_the_seed_matters(small_run, tmp_path):
    arms = ["gumbel-rao"]
    again = discrete_vae.main([*SMALL, "--arms", *arms, "--output_dir", str(tmp_path)])
    assert len(again["runs"]) == 3

    def known(results):
        return {(r["arm"], r["learning_rate"], r["seed"]): r["curve"] for r in results["runs"] if r["arm"] in arms}

    assert known(again) == known(small_run[1])
    curves = known(again)
    rate = choose_rate(again, "gumbel-rao")
    assert curves["gumbel-rao", rate, 0] != curves["gumbel-rao", rate, 1]


def test_finished_runs_are_not_repeated(small_run, capsys):
    folder, results = small_run
    capsys.readouterr()
    assert discrete_vae.main([*SMALL, "--arms", *SMALL_ARMS, "--output_dir", str(folder)]) == results
    assert "validation" not in capsys.readouterr().out.split("| arm")[0]
    with pytest.raises(UsageError, match="holds runs with --steps 4, now it is 5: take another --output_dir"):
        discrete_vae.main([*SMALL, "--arms", *SMALL_ARMS, "--steps", "5", "--output_dir", str(folder)])


def test_the_tested_weights_are_the_best_on_the_validation_images(monkeypatch):
    """A model that gets worse after the first look is tested as it was at that look."""
    args = discrete_vae.parse_args([*SMALL, "--steps", "6"])
    bounds, states = iter([3.0, 9.0, 9.0]), []

    def fake(model, images, samples, seed):
        states.append(copy.deepcopy(model.state_dict()))
        value = torch.tensor([next(bounds, 1.0)])
        return Bound(value, torch.zeros(1))

    monkeypatch.setattr(discrete_vae, "negative_elbo", fake)
    split = split_images(load_images(), 0)
    row = discrete_vae.train(ARMS["softmax-st"], 1e-2, 0, split, args, lambda step: 1.0)
    assert (row["best_step"], row["validation"], row["test"]) == (2, 3.0, 1.0)
    torch.testing.assert_close(states[-1], states[0], rtol=0, atol=0)
    assert not torch.equal(states[1]["encoder.0.weight"], states[0]["encoder.0.weight"])


def made_up(arms, tests, rates=(1e-3,)):
    runs = []
    for arm, values in zip(arms, tests, strict=True):
        for seed, value in enumerate(values):
            row = {"arm": arm, "learning_rate": 1e-3, "seed": seed, "validation": value, "best_step": 4}
            row |= {"test": value, "reconstruction": value - 1, "divergence": 1.0, "curve": [value] * 2}
            runs.append(row)
    settings = {"arms": list(arms), "seeds": len(tests[0]), "selection_seeds": 1, "learning_rates": list(rates)}
    settings |= {"steps": 4, "batch_size": 2, "eval_every": 2, "test_samples": 3}
    return {"settings": settings, "runs": runs, "meanings": dict.fromkeys(arms, "made up")}


def test_the_learning_rate_is_the_best_on_the_validation_images_of_the_selection_seeds():
    results = made_up(["gumbel-st"], [[5.0, 5.0]], rates=(1e-3, 1e-2))
    other = {**results["runs"][0], "learning_rate": 1e-2, "validation": 4.0, "test": 9.0}
    results["runs"] += [other, {**other, "seed": 1}]
    assert choose_rate(results, "gumbel-st") == 1e-2
    assert "0.01 (edge) | 9.00 ± 0.00" in report(results)


def test_comparisons_are_paired_t_tests_with_holms_correction():
    tests = [[20.0, 22.0, 21.0, 23.0], [20.4, 22.5, 21.5, 23.6], [20.1, 21.9, 21.1, 22.9]]
    arms = ["gumbel-soft", "gumbel-st", "softmax-st"]
    results = made_up(arms, tests)
    compared = {
        (item.first, item.second): item for item in compare(dict(zip(arms, _rows(results, arms), strict=True)))
    }
    item = compared["gumbel-soft", "gumbel-st"]
    expected = stats.ttest_rel(tests[0], tests[1])
    assert item.mean == pytest.approx(-0.5)
    assert item.p == pytest.approx(expected.pvalue)
    assert item.half_width == pytest.approx(expected.confidence_interval().high + 0.5)
    assert item.adjusted == pytest.approx(3 * min(c.p for c in compared.values()))
    text = report(results)
    assert "Order of the means, best first: gumbel-soft < softmax-st < gumbel-st." in text
    assert "Published order: gumbel-soft < gumbel-st < softmax-st." in text
    assert "is another" in text
    assert "| gumbel-soft - gumbel-st | -0.50 ± 0.13 |" in text
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert lines["| gumbel-soft - gumbel-st"].endswith("| -6.3 | agrees |")
    assert lines["| gumbel-st - softmax-st"].endswith("| -3.1 | contrary |")
    assert lines["| gumbel-soft - softmax-st"].endswith("| -9.4 | undecided |")


def _rows(results, arms):
    return [[row for row in results["runs"] if row["arm"] == arm] for arm in arms]


def test_rows_of_a_table_are_as_long_as_its_head(small_run):
    blocks = report(small_run[1]).split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) == 2
    for lines in tables:
        assert len(lines) >= 3
        assert len({line.count("|") for line in lines}) == 1


def test_statistics_of_equal_and_constant_differences():
    assert paired([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 1.0)
    assert paired([1.0, 2.0], [2.0, 3.0]) == (-1.0, 0.0, 0.0)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_plot_has_a_line_for_each_arm():
    arms = ["gumbel-soft", "gumbel-st"]
    axes = plot(made_up(arms, [[1.0, 2.0], [3.0, 4.0]])).axes[0]
    assert [line.get_label() for line in axes.lines] == arms
    assert list(axes.lines[0].get_ydata()) == [1.5, 1.5]
    assert list(axes.lines[0].get_xdata()) == [2, 4]
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arms", "gumbel"], "unknown arm 'gumbel'; there are gumbel-soft"),
        (["--arms", "reinmax", "reinmax"], "each arm must be named once"),
        (["--seeds", "1"], "--seeds must be at least 2, got 1"),
        (["--selection_seeds", "4"], "--selection_seeds must be at most --seeds 3, got 4"),
        (["--learning_rates", "0"], "--learning_rates must be finite, > 0 and differ from each other"),
        (["--learning_rates", "1e-3", "1e-3"], "--learning_rates must be finite, > 0 and differ"),
        (["--tau_end", "1"], "--tau_end must be between 0 and 1"),
        (["--steps", "1"], "--steps must be at least 2, got 1"),
    ],
)
def test_bad_arguments_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        discrete_vae.parse_args(argv)
    assert message in capsys.readouterr().err


def test_no_arms_are_refused():
    with pytest.raises(UsageError, match="at least one, got none"):
        choose_arms([], discrete_vae.KNOWN)
