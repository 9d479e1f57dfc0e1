"""Story question answering: the script end to end in small, its metrics by hand, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import story_qa
from harness.errors import UsageError
from harness.library_layers import LibraryLayers
from harness.parsing import parse_arguments
from harness.stopping import Stopped
from tasks import story_answering as task
from tasks.babi import Story, WorldSettings, encode_stories, generate_stories, read_babi, write_babi
from tasks.story_answering import StoryArguments
from tasks.story_model import StoryOutput

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "finetune"


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """A run of six optimiser steps on stories with two supporting facts."""
    files = {}
    for seed, (name, stories) in enumerate({"train_file": 24, "validation_file": 9}.items()):
        files[name] = str(tmp_path / name)
        write_babi(generate_stories(WorldSettings(2, stories, questions=2, places=3), seed), files[name])
    return {
        **files,
        "width": 8,
        "max_facts": 8,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 5,
        "max_train_steps": 6,
        "learning_rate": 1e-2,
        "eval_steps": 4,
        "logging_steps": 4,
        "hard": True,
        "tau": 2.0,
        "tau_schedule": "exponential",
        "tau_end": 0.5,
        "output_dir": str(tmp_path / "run"),
    }


def start(settings: dict[str, Any], **changes: Any) -> Any:
    return story_qa.run(StoryArguments(**{**settings, **changes}))


def data_of(settings: dict[str, Any], **changes: Any) -> task.StoryData:
    return task.load_data(StoryArguments(**{**settings, **changes}), lambda line: None)


def held_out(settings: dict[str, Any], **changes: Any) -> tuple[list[Story], list[Story]]:
    """The stories to train and to evaluate on, as :func:`tasks.story_answering.load_data` has them encoded."""
    encoded = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(task, "encode_stories", lambda *given: encoded.append(given[0]) or encode_stories(*given))
        data_of(settings, **changes)
    train, evaluated = encoded
    return train, evaluated


def outcome(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    weights = (folder / "model" / "model.safetensors").read_bytes()
    return {key: results[key] for key in ("final", "series", "steps")} | {"weights": weights}


@pytest.mark.parametrize(
    "arm",
    [{}, {"hard": False, "tau_schedule": "constant", "tau_end": None, "learn_tau": "scalar"}],
    ids=["gumbel-st", "learned-tau"],
)
def test_a_run_ends_with_the_metrics_of_its_saved_model(
    tiny: dict[str, Any], tmp_path: Path, arm: dict[str, Any]
) -> None:
    record = start(tiny, save_model=True, **arm)
    assert [entry["mode"] for entry in record.evaluation] == ["noise_off", "noise_on"] * 2
    model, vocabulary = task.load_model(tmp_path / "run" / "model")
    if not arm:
        assert [layer.gumbel.tau.item() for layer in model.attention] == [0.5, 0.5]
    stories = task._read(tiny["validation_file"], "validation_file")
    losses, right, gold, complete = [], 0, 0, 0
    for story in stories:
        output = model(encode_stories([story], vocabulary))
        losses.append(-output.logits.log_softmax(-1)[0, vocabulary.answer_index[story.answer]].item())
        right += vocabulary.answers[int(output.logits.argmax())] == story.answer
        picks = output.weights[0].argmax(-1).tolist()
        gold += sum(pick in story.supports for pick in picks)
        complete += set(picks) >= set(story.supports)
    final = record.final["noise_off"]
    assert final["loss"] == pytest.approx(sum(losses) / 18, rel=1e-5)
    assert final["accuracy"] == pytest.approx(right / 18)
    assert final["supporting_fact_accuracy"] == pytest.approx(gold / 36)
    assert final["all_supports_found"] == pytest.approx(complete / 18)
    assert final != record.final["noise_on"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["hops"] == 2
    chance = sum(len(story.supports) / len(story.facts) for story in stories) / 18
    assert results["supporting_fact_accuracy_of_chance"] == pytest.approx(chance)


def test_metrics_of_choices_that_are_known(tiny: dict[str, Any]) -> None:
    """Both facts right; the same right fact twice; one right; none right."""
    data = data_of(tiny)
    rows = data.validation.select(torch.arange(4))

    class Choosing(torch.nn.Module):
        def forward(self, batch: task.StoryBatch) -> StoryOutput:
            gold = [row.nonzero().flatten().tolist() for row in batch.supports]
            other = [next(fact for fact in range(9) if fact not in facts) for facts in gold]
            (a, b), (c, _), (_, d) = gold[:3]
            picks = torch.tensor([[b, a], [c, c], [other[2], d], [other[3], other[3]]])
            logits = torch.nn.functional.one_hot(batch.answer, 4).float()
            logits[3] = logits[3].roll(1)
            return StoryOutput(logits, torch.empty(0), picks)

    metrics = task.evaluate(Accelerator(), Choosing(), [dict(vars(rows))])
    assert metrics["accuracy"] == 0.75
    assert metrics["supporting_fact_accuracy"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert metrics["all_supports_found"] == 0.25


def test_hard_choices_are_one_hot_with_and_without_noise(tiny: dict[str, Any]) -> None:
    data = data_of(tiny)
    args = StoryArguments(**tiny)
    model = task.make_model(data, args)
    for training in (True, False):
        weights = model.train(training)(data.train).weights
        assert torch.equal(weights, torch.nn.functional.one_hot(weights.argmax(-1), weights.shape[-1]).float())
    soft = task.make_model(data, StoryArguments(**{**tiny, "attention": "unpatched"}))(data.train).weights
    assert soft.max() < 1


def test_a_stopped_run_goes_on_to_the_same_bits(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny["save_model"] = True
    start(tiny, output_dir=str(tmp_path / "whole"))
    calls, compute_loss = [0], story_qa.compute_loss

    def interrupted(model: Any, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            signal.raise_signal(signal.SIGTERM)
        return compute_loss(model, batch)

    with monkeypatch.context() as patched:
        patched.setattr(story_qa, "compute_loss", interrupted)
        with pytest.raises(Stopped):
            start(tiny)
    record = start(tiny, resume_from_checkpoint="latest")
    assert record.resumed_at == [4]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_layers_of_the_library_are_handled_together(tiny: dict[str, Any]) -> None:
    data = data_of(tiny)
    model = task.make_model(data, StoryArguments(**tiny)).eval()
    layers = LibraryLayers(model)
    layers.set_tau(0.25)
    assert [tau.item() for tau in layers.tau] == [0.25, 0.25]
    before = model(data.train).logits
    with layers.noise(True):
        assert not torch.equal(model(data.train).logits, before)
    assert torch.equal(model(data.train).logits, before)
    assert layers.learned_tau_parameters() == []
    with pytest.raises(UsageError, match="Linear has no layer of gumbel_attention"):
        LibraryLayers(torch.nn.Linear(2, 2))


def test_stories_are_generated_where_no_file_is_given(tmp_path: Path) -> None:
    record = start({
        "supporting_facts": 2, "train_stories": 60, "validation_stories": 5, "facts": 4, "distractors": 0,
        "max_train_steps": 1, "attention": "unpatched", "output_dir": str(tmp_path),
    })  # fmt: skip
    assert set(record.final) == {"noise_off"}


def test_long_sentences_are_cut_and_told(tiny: dict[str, Any]) -> None:
    lines: list[str] = []
    data = task.load_data(StoryArguments(**tiny, max_words=4), lines.append)
    assert data.train.facts.shape[2] == 4
    assert [line.split(" of ")[0].partition(":")[0] for line in lines] == ["train", "validation"]
    assert all(re.search(r"\d+ of \d+ different sentences are cut to max_words=4", line) for line in lines)


def test_stories_are_held_out_whole_and_the_same_for_every_seed(tiny: dict[str, Any], tmp_path: Path) -> None:
    stories = read_babi(tiny["train_file"])
    tiny |= {"validation_file": str(tmp_path / "nowhere")}  # it is not read

    def numbers(**changes: Any) -> tuple[list[int], list[int]]:
        train, held = held_out(tiny, holdout_percentage=25, **changes)
        assert sorted([*train, *held], key=stories.index) == stories, "every question is on one side"
        return [story.story_id for story in train], [story.story_id for story in held]

    train, held = numbers()
    assert not set(train) & set(held)
    assert {train.count(number) for number in train} == {held.count(number) for number in held} == {2}
    assert len(set(held)) == 24 // 4
    assert numbers(seed=7) == (train, held)
    assert numbers(data_seed=7) != (train, held)


def test_a_subset_is_taken_before_stories_are_held_out(tiny: dict[str, Any]) -> None:
    subset, _ = held_out(tiny, max_train_samples=20)
    train, held = held_out(tiny, max_train_samples=20, holdout_percentage=30)
    assert sorted([*train, *held], key=repr) == sorted(subset, key=repr)
    numbers = {story.story_id for story in held}
    assert len(numbers) == len({story.story_id for story in subset}) * 30 // 100
    assert not numbers & {story.story_id for story in train}


def test_generated_stories_are_held_out_and_answered(tmp_path: Path) -> None:
    generated = {"train_stories": 40, "max_train_steps": 1, "attention": "unpatched", "output_dir": str(tmp_path)}
    whole, validation = held_out(generated)
    train, held = held_out(generated, holdout_percentage=10)
    assert [len(train), len(held), len(validation)] == [36, 4, 500]
    assert sorted([*train, *held], key=repr) == sorted(whole, key=repr)
    assert set(start(generated, holdout_percentage=10).final) == {"noise_off"}


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0, "holdout_percentage must be from 1 to 99"),
        (100, "holdout_percentage must be from 1 to 99"),
        (4, "holdout_percentage=4 of the 24 training stories is 0: there must be stories on both sides"),
    ],
)
def test_a_holdout_that_leaves_nothing_is_refused(tiny: dict[str, Any], share: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        data_of(tiny, holdout_percentage=share)
    assert len(data_of(tiny, holdout_percentage=5).validation) == 2


def test_an_answer_of_held_out_stories_that_training_does_not_know_is_refused(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    places = ["moon", "home", "sea", "hill"]
    tiny["train_file"] = str(tmp_path / "places")
    Path(tiny["train_file"]).write_text("".join(f"1 Ann sat.\n2 Where? \t{place}\t1\n" for place in places))
    with pytest.raises(UsageError, match=r"held-out question 1 .* which is not among the training answers"):
        data_of(tiny, holdout_percentage=25)


def test_what_cannot_be_used_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    files = {
        "empty": "",
        "bad": "1 Ann went home.\n2 Where is Ann?\thome\n",
        "one": "1 Ann went home.\n2 Where is Ann? \thome\t1\n",
        "other": "1 Ann went home.\n2 Where is Ann? \tmoon\t1\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    cases = [
        ({"train_file": str(tmp_path / "none")}, "no such file"),
        ({"train_file": str(tmp_path / "empty")}, "expected bAbI stories, got an empty file"),
        ({"train_file": str(tmp_path / "bad")}, "line 2: expected question<TAB>answer<TAB>supporting ids"),
        ({"train_file": str(tmp_path / "one")}, "have the answer 'home'; there is nothing to learn"),
        (
            {"validation_file": str(tmp_path / "other")},
            "validation question 1 ('Where is Ann?') has the answer 'moon'",
        ),
        ({"validation_file": None}, "give both train_file and validation_file, or neither"),
        ({"layers": (0,)}, "one attention layer in each hop"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"heads": (3,)}, "heads [3] match nothing"),
        ({"train_file": None, "validation_file": None, "facts": 0}, "facts: expected at least 1, got 0"),
    ]
    for changes, message in cases:
        with pytest.raises(UsageError, match=re.escape(message)):
            start(tiny, **changes)


@pytest.mark.parametrize("name", ["babi_qa1", "babi_qa2"])
def test_the_configurations_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BABI_DIR", "data")
    args = parse_arguments(StoryArguments, ["--config", str(CONFIGS / f"{name}.yaml")])
    assert args.train_file is not None
    assert args.train_file.startswith(f"data/{name.removeprefix('babi_')}_")
