"""The figures of the noise in small: files, numbers, and that a run repeats."""

import json

import numpy as np
import pytest
import torch
from scipy import special

import noise_figures

SMALL = ["--samples", "2000", "--seed", "3"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise") / "new" / "folder"
    return folder, noise_figures.main([*SMALL, "--output_dir", str(folder)])


def test_a_run_writes_both_pictures_and_its_numbers(small_run):
    folder, numbers = small_run
    assert {path.name for path in folder.iterdir()} == {"relaxed_samples.png", "families.png", "noise_figures.json"}
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    written = json.loads((folder / "noise_figures.json").read_text())
    assert written["families"] == numbers["families"]
    assert written["settings"]["seed"] == 3
    assert written["versions"]["torch"] == torch.__version__
    assert written["command"] == f"python training/noise_figures.py --samples 2000 --seed 3 --output_dir {folder}"


def test_relaxed_samples_sharpen_from_the_middle_to_the_hard_choice(small_run):
    rows = small_run[1]["relaxed"]
    assert [row["tau"] for row in rows] == [None, *noise_figures.TAUS]
    samples = np.array([row["samples"] for row in rows])  # (temperatures, draws, categories)
    np.testing.assert_allclose(samples.sum(-1), 1.0)
    assert np.isin(samples[0], (0.0, 1.0)).all()
    assert (samples.argmax(-1) == samples[0].argmax(-1)).all()  # one draw in a row, whatever tau is
    assert (np.diff(samples.max(-1), axis=0) < 0).all()
    hard, middle = np.array(rows[0]["mean"]), np.array(rows[-1]["mean"])
    error = np.array(rows[0]["standard_error"])
    assert (abs(hard - noise_figures.CATEGORICAL) < 6 * error).all()  # false alarm below 1e-7
    assert (abs(middle - 1 / 6) < abs(noise_figures.CATEGORICAL - np.array(1 / 6))).all()


def test_the_sampled_distance_is_an_estimate_of_the_exact_one(small_run):
    rows = small_run[1]["families"]
    assert len(rows) == len(noise_figures.FAMILIES) * len(noise_figures.SPREADS)
    for row in rows:
        exact, softmax = np.array(row["exact"]), np.array(row["softmax"])
        np.testing.assert_allclose(softmax, special.softmax(row["spread"] * np.array(noise_figures.DIRECTION)))
        assert row["total_variation"] == pytest.approx(0.5 * abs(exact - softmax).sum(), abs=1e-15)
        assert row["interval"][0] <= row["sampled"] <= row["interval"][1]
        favoured = noise_figures.favoured_set(exact, softmax)
        share = exact[favoured].sum()
        assert share - softmax[favoured].sum() == pytest.approx(row["total_variation"], abs=1e-8)
        error = (share * (1 - share) / 2000) ** 0.5
        assert abs(row["sampled"] - row["total_variation"]) < 6 * error + 5 / 2000
        assert sum(row["counts"]) == 2000


def test_a_run_repeats_and_another_seed_is_another_run(small_run):
    rows = small_run[1]["families"][:3]
    again = noise_figures.family_rows(2000, 3)
    assert again[:3] == rows
    assert noise_figures.sampled_counts("gumbel", [0.0, 1.0], 2000, 0).tolist() != (
        noise_figures.sampled_counts("gumbel", [0.0, 1.0], 2000, 1).tolist()
    )


@pytest.mark.parametrize("family", noise_figures.FAMILIES)
def test_choice_probabilities_follow_the_scores(family):
    p = noise_figures.choice_probabilities(family, [0.0, 1.0, 1.0, -2.0])
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    assert p[1] == pytest.approx(p[2], rel=1e-10)
    assert p[1] > p[0] > p[3] > 0
    np.testing.assert_allclose(noise_figures.choice_probabilities(family, [7.0, 8.0, 8.0, 5.0]), p, rtol=1e-9)


def test_an_integral_that_misses_something_is_noticed(monkeypatch):
    density = noise_figures.log_density
    monkeypatch.setattr(noise_figures, "log_density", lambda family, x: density(family, x) - np.log(2.0))
    with pytest.raises(ArithmeticError, match=r"sum to 0\.5\."):
        noise_figures.choice_probabilities("normal", [0.0, 1.0])


@pytest.mark.parametrize(("option", "least"), [("--samples", 2), ("--seed", 0)])
def test_numbers_that_are_too_small_are_refused(option, least, capsys):
    with pytest.raises(SystemExit):
        noise_figures.parse_args([option, str(least - 1)])
    assert f"expected a whole number of at least {least}, got {least - 1}" in capsys.readouterr().err
