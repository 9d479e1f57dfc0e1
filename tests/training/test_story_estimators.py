"""The estimators' study on stories in small: arms, shared beginnings, interrupted runs, the table."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

import gumbel_attention as ga
import story_estimators as study
from harness.errors import UsageError
from tasks.babi import Story, Vocabulary
from tasks.story_report import choose_rate, report
from tasks.story_sequence import FUNCTION_WORDS, encode_sequences

SIZES = {"steps": 3, "batch_size": 4, "eval_every": 2, "train_stories": 60, "test_stories": 10, "seeds": 2}
SMALL = [word for name, size in (SIZES | {"validation_stories": 8}).items() for word in (f"--{name}", str(size))]


def settings(*more: str):
    return study.parse_args([*SMALL, *more])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "new"
    torch.set_num_threads(1)
    return folder, study.main([*SMALL, "--learning_rates", "1e-3", "--output_dir", str(folder)])


@pytest.fixture(scope="module")
def splits():
    return study.make_splits(settings(), seed=0)


def test_every_arm_takes_its_steps_and_gives_finite_numbers(small_run):
    _, results = small_run
    assert [(row["arm"], row["seed"]) for row in results["runs"]] == [(a, s) for s in (0, 1) for a in study.ARMS]
    for row in results["runs"]:
        assert row["lost_at"] is None
        assert [step for step, _ in row["curve"]] == [2, 3]
        for name in ("validation", "test", "test_noise", "test_one_key"):
            assert 0 <= row[name] <= 1
        assert math.isfinite(row["seconds_per_step"])


@pytest.mark.parametrize("name", study.ARMS)
def test_gradients_reach_the_patched_layers_queries_and_keys(name, splits):
    model = study.make_model(splits, seed=0)
    patch = ga.patch_model(model, study.ARMS[name].config(2.0))
    assert [layer.name for layer in patch.layers] == ["bert.encoder.layer.1.attention.self"]
    study.Objective(study.ARMS[name])(model, splits.train.select(slice(0, 8))).backward()
    for part in ("query", "key"):
        gradient = model.get_parameter(f"bert.encoder.layer.1.attention.self.{part}.weight").grad
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_arms_share_initialisation_and_order(small_run, splits, monkeypatch):
    args, seen = settings("--learning_rates", "1e-3"), {}
    for name in ("softmax", "gumbel-st", "reinforce-loo"):
        first, batches = {}, []

        def begin(splits, seed, first=first, make=study.make_model):
            model = make(splits, seed)
            first.update(copy.deepcopy(model.state_dict()))
            return model

        def losses(model, batch, batches=batches, compute=study.story_losses):
            batches.append(batch.input_ids[:4])
            return compute(model, batch)

        with monkeypatch.context() as patched:
            patched.setattr(study, "make_model", begin)
            patched.setattr(study, "story_losses", losses)
            study.train(name, 1e-3, 0, splits, args)
        seen[name] = (first, batches)
    weights, order = seen.pop("softmax")
    assert not torch.equal(order[0], order[1])
    for other_weights, other_order in seen.values():
        torch.testing.assert_close(other_weights, weights, rtol=0, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(other_order, order, strict=True))


def test_a_run_repeats_and_another_seed_does_not(small_run, splits):
    row = dict(small_run[1]["runs"][3])
    again = study.train(row["arm"], 1e-3, 0, splits, settings("--learning_rates", "1e-3"))
    assert {**again, "seconds_per_step": 0} == {**row, "seconds_per_step": 0}
    other = study.make_model(splits, seed=1)
    assert not torch.equal(other.classifier.weight, study.make_model(splits, seed=0).classifier.weight)


def test_score_function_counts_the_choice_of_the_first_token_alone(splits):
    model = study.make_model(splits, seed=0)
    ga.patch_model(model, study.ARMS["reinforce-average"].config(1.0))
    batch = splits.train.select(slice(0, 8))
    torch.manual_seed(5)
    with ga.collect_log_probs(model) as chosen:
        losses = study.story_losses(model, batch)
    expected = ga.score_function_loss(losses, chosen.layers[0][:, :, 0].sum(1), 0.0)
    torch.manual_seed(5)
    found = study.Objective(study.ARMS["reinforce-average"])(model, batch)
    weight = model.bert.encoder.layer[1].attention.self.query.weight
    torch.testing.assert_close(torch.autograd.grad(found, weight), torch.autograd.grad(expected, weight))


def test_moving_average_is_that_of_the_batches_before(splits):
    model = study.make_model(splits, seed=0)
    ga.patch_model(model, study.ARMS["reinforce-average"].config(1.0))
    objective = study.Objective(study.ARMS["reinforce-average"])
    batch, losses = splits.train.select(slice(0, 8)), torch.tensor([1.0, 3.0])
    assert objective._baseline(model, batch, losses) == 0.0
    assert objective._baseline(model, batch, losses + 5) == 2.0


def test_a_loss_that_is_not_finite_is_a_result(splits, monkeypatch):
    monkeypatch.setattr(study, "story_losses", lambda model, batch: torch.full((4,), torch.nan))
    row = study.train("softmax", 1e-3, 0, splits, settings("--learning_rates", "1e-3"))
    assert (row["lost_at"], row["curve"], row["steps_to_target"]) == (0, [], None)


def test_the_table_is_a_function_of_the_file(small_run):
    folder, _ = small_run
    read = json.loads((folder / study.RESULTS_FILE).read_text())
    assert report(read) == (folder / study.TABLE_FILE).read_text()
    assert read["versions"]["torch"] == torch.__version__
    assert read["command"].startswith("python training/story_estimators.py --steps 3")


def test_interrupted_runs_go_on(tmp_path, monkeypatch):
    options = [*SMALL, "--learning_rates", "1e-3", "--arms", "softmax", "--output_dir", str(tmp_path)]
    study.main([*options, "--seeds", "1"])
    done, trained = study.train, []

    def train(name, rate, seed, *rest):
        trained.append((name, seed))
        return done(name, rate, seed, *rest)

    monkeypatch.setattr(study, "train", train)
    results = study.main([*options, "--arms", "softmax", "det-st"])
    assert trained == [("det-st", 0), ("softmax", 1), ("det-st", 1)]
    assert len(results["runs"]) == 4
    with pytest.raises(UsageError, match="holds runs with steps 3, this one would have 4"):
        study.main([*options, "--steps", "4"])


def row(arm, rate, seed, validation, **more):
    accuracies = {"test": validation, "test_noise": 0.5, "test_one_key": 0.25}
    rest = {"steps_to_target": None, "seconds_per_step": 0.0125, "extra_passes": 0, "lost_at": None}
    curve = [[10, validation]]
    return {"arm": arm, "learning_rate": rate, "seed": seed, "validation": validation, **accuracies, **rest} | {
        "curve": curve,
        **more,
    }


def test_table_against_hand_numbers():
    names = ("steps", "batch_size", "test_stories", "eval_every", "target", "tau_start", "tau_end")
    chosen = {name: getattr(settings(), name) for name in names}
    results = {
        "settings": {**chosen, "arms": ["a", "b", "c"], "learning_rates": [0.1, 0.2], "seeds": 2},
        "meanings": {"a": "first", "b": "second", "c": "third"},
        "noisy_passes": 4,
        "runs": [
            row("a", 0.1, 0, 0.9),
            row("a", 0.2, 0, 0.95, steps_to_target=10),
            row("a", 0.2, 1, 0.85),
            row("b", 0.1, 0, 0.5, lost_at=7),
        ],
    }
    lines = report(results).splitlines()
    a = "| `a` | 0.2 of 0.1, 0.2 | 90.0 (85.0 to 95.0) | 50.0 (50.0 to 50.0) | 25.0 (25.0 to 25.0) |"
    assert lines[2] == f"{a} 10, not reached | 12 | 0 |"
    assert lines[3].startswith("| `b` (n=1), loss not finite in seed 0 | 0.1 of 0.1, 0.2 | 50.0 | 50.0 | 25.0 | not")
    assert not any("`c`" in line for line in lines)


def test_equal_validation_is_decided_by_speed():
    runs = [row("a", 0.1, 0, 1.0, curve=[[5, 0.2], [10, 1.0]]), row("a", 0.2, 0, 1.0, curve=[[5, 0.4], [10, 1.0]])]
    results = {"settings": {"learning_rates": [0.1, 0.2]}, "runs": [*runs, row("a", 0.1, 1, 1.0), row("a", 0.3, 0, 1)]}
    assert choose_rate(results, "a") == 0.2
    with pytest.raises(ValueError, match="no run of arm 'b' with seed 0"):
        choose_rate(results, "b")


def test_no_story_is_in_two_uses():
    args = settings("--train_stories", "1000", "--test_stories", "100", "--validation_stories", "100")
    splits = study.make_splits(args, seed=0)
    known = {tuple(tokens) for tokens in splits.train.input_ids.tolist()}
    assert len(splits.test) == len(splits.validation) == 100
    width = splits.train.input_ids.shape[1]
    for other in (splits.validation, splits.test):
        padded = torch.nn.functional.pad(other.input_ids, (0, width - other.input_ids.shape[1]))
        assert not known & {tuple(tokens) for tokens in padded.tolist()}
    with pytest.raises(UsageError, match="stories that are not among the 9000 for training: take fewer"):
        study.make_splits(settings("--train_stories", "9000", "--actors", "1", "--places", "2"), seed=0)


def test_tokens_of_a_story():
    story = Story(("Nora walked to the library.", "Emil told a joke."), "Where is Nora?", "library", (0,), 0)
    vocabulary = Vocabulary([story])
    batch = encode_sequences([story], vocabulary)
    names = {number: word for word, number in vocabulary.words.items()} | {vocabulary.size: "[SEP]"}
    tokens = [names[number] for number in batch.input_ids[0].tolist()]
    assert " ".join(tokens) == "nora [SEP] nora walked library [SEP] emil told joke [SEP]"
    assert not FUNCTION_WORDS & set(tokens)
    assert batch.token_type_ids[0].tolist() == [0, 0, 2, 2, 2, 2, 1, 1, 1, 1]
    assert batch.position_ids[0].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"expected answers among \['library'\], got \['tower'\]"):
        encode_sequences([Story(story.facts, story.question, "tower", (0,), 0)], vocabulary)
    with pytest.raises(ValueError, match="expected at least one story, got none"):
        encode_sequences([], vocabulary)


def test_padding_changes_nothing(splits):
    model = study.make_model(splits, seed=0).eval()
    told = ("Nora walked to the library.", "Emil hurried to the bakery.")
    stories = [Story(told[:count], "Where is Nora?", splits.vocabulary.answers[0], (0,), 0) for count in (1, 2)]
    batch = encode_sequences(stories, splits.vocabulary)
    alone = batch.select(slice(0, 1))
    assert (alone.input_ids.shape[1], batch.input_ids.shape[1]) == (6, 10)
    torch.testing.assert_close(model(**alone.inputs()).logits[0], model(**batch.inputs()).logits[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "softmax", "gumbal-st"], "--arms must be different ones of ['softmax', "),
        (["--arms", "softmax", "softmax"], "got ['softmax', 'softmax']"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--learning_rates", "0"], "--learning_rates must be finite, > 0 and differ from each other, got [0.0]"),
        (["--target", "1.5"], "--target must be above 0 and at most 1, got 1.5"),
        (["--tau_end", "0"], "end must be a finite number > 0, got 0.0"),
        (["--actors", "99"], "actors: expected 1 to 8, got 99"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        study.parse_args(arguments)
    assert message in " ".join(capsys.readouterr().err.split())
