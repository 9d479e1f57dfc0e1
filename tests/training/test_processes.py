"""Two processes on one machine without a GPU: they start once, and every test looks at what they saw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from interrupted import outcome, start
from safetensors.torch import load_file
from tiny import sentences, small_settings, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from two_processes import ENDS, SIZES, quiet_run, rows_evaluated

import gumbel_attention as ga
from forked import run_in_two
from harness.checkpoints import find_checkpoints
from harness.evaluation import NOISE_OFF

TOLERANCE = 1e-6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(base: Path, bert: str) -> dict[str, Any]:
    """The settings of a run without dropout: six steps of eight examples, for one process."""
    still, vivid = base / "still", base / "vivid"
    for folder, dropout in ((still, 0.0), (vivid, 0.1)):
        shutil.copytree(bert, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config |= {"initializer_range": 0.2}
        (folder / "config.json").write_text(json.dumps(config))
    return small_settings(str(still), base)


@pytest.fixture(scope="module")
def alone(base: Path, one: dict[str, Any]) -> dict[str, Any]:
    """The run of one process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ACCELERATE_USE_CPU", "true")
        start(one, hard=True, output_dir=str(base / "one-noisy"), checkpointing_steps=3, num_train_epochs=2)
        return quiet_run(one, output_dir=str(base / "one"), checkpointing_steps=1, keep_last=None)


@pytest.fixture(scope="module")
def both(base: Path, one: dict[str, Any], alone: dict[str, Any]) -> list[dict[str, Any]]:
    """What the first and the second process saw."""
    write_rows(base / "uneven.tsv", sentences(22))
    settings = one | {"with_dropout": str(base / "vivid")}
    (base / "settings.json").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ACCELERATE_USE_CPU", "true")
        run_in_two(two_processes.main, base, log=base / "log", seconds=900.0)
    return [torch.load(base / f"process_{rank}.pt") for rank in (0, 1)]


def losses(series: dict[str, Any], noise_on: bool = False) -> list[float]:
    """Of training, then of evaluation, with noise too if told to: that depends on the number of processes."""
    evaluations = [entry for entry in series["evaluation"] if noise_on or entry["mode"] == NOISE_OFF]
    return [entry["loss"] for entry in [*series["train"], *evaluations]]


def assert_the_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert losses(found) == pytest.approx(losses(expected), abs=TOLERANCE, rel=0)
    for step, (gradient, wanted) in enumerate(zip(found["gradients"], expected["gradients"], strict=True)):
        torch.testing.assert_close(gradient, wanted, atol=TOLERANCE, rtol=0, msg=lambda m, s=step: f"step {s}: {m}")


def test_two_processes_of_four_examples_take_the_steps_of_one_of_eight(
    both: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    gradients = alone["gradients"]
    assert min(gradient.abs().max() for gradient in gradients) > 1e-2, "the gradients are far above the tolerance"
    assert (gradients[0] - gradients[1]).abs().max() > 1e-2, "and differ from batch to batch"
    for process in both:
        assert_the_same_run(process["quiet"], alone)


def test_gradient_accumulation_changes_nothing(both: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Two processes, two batches each of two examples."""
    for process in both:
        assert_the_same_run(process["accumulated"], alone)


@pytest.mark.parametrize("run", ["uneven", "uneven, accumulated"])
def test_the_end_of_an_epoch_counts_every_example_once_and_alike(
    base: Path, one: dict[str, Any], both: list[dict[str, Any]], run: str
) -> None:
    """22 examples: the last step has six, in batches of 4 + 2, or of 2 and 2 + 0 where processes accumulate."""
    uneven = one | {"train_file": str(base / "uneven.tsv")}
    expected = quiet_run(uneven, output_dir=str(base / f"one-{run}"))
    for process in both:
        assert_the_same_run(process[run], expected)
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert_the_same_run(quiet_run(uneven, **halves, output_dir=str(base / f"halves-{run}")), expected)


def differing(first: list[torch.Tensor], second: list[torch.Tensor]) -> list[bool]:
    assert len(first) == len(second) > 0
    return [not torch.equal(*pair) for pair in zip(first, second, strict=True)]


@pytest.mark.parametrize("run", ["noise", "noise after one process"])
def test_every_process_draws_its_own_noise(both: list[dict[str, Any]], run: str) -> None:
    """In training at every step, in evaluation where it is on; weights, batch and dropout (off) are the same."""
    first, second = (process[run] for process in both)
    assert all(differing(first["training"], second["training"]))
    assert differing(first["evaluation"], second["evaluation"]) == [False, True], "noise off, noise on"
    assert not torch.equal(first["training"][0], first["training"][1])


def test_the_noise_of_processes_that_are_seeded_alike_is_the_same(both: list[dict[str, Any]]) -> None:
    """The control of the test above."""
    first, second = (process["noise, seeded alike"] for process in both)
    assert not any(differing(first["training"], second["training"]))


def test_evaluation_counts_every_row_once(both: list[dict[str, Any]]) -> None:
    for (rows, batch_size), *found in zip(SIZES, *(process["evaluated"] for process in both), strict=True):
        expected = rows_evaluated(rows, 2 * batch_size)
        assert expected["rows"] == list(range(rows))
        for process in found:
            assert process["rows"] == list(range(rows)), f"{rows} rows, batches of {batch_size}"
            assert process["metrics"] == pytest.approx(expected["metrics"], abs=TOLERANCE), f"{rows} rows"


def test_a_checkpoint_of_two_processes_goes_on_in_one_and_back(
    base: Path, one: dict[str, Any], both: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    """From the fourth of six steps, in the middle of an epoch; noise is off."""
    checkpoint = str(base / "two" / "checkpoint-4")
    found = quiet_run(one, output_dir=str(base / "from-two"), resume_from_checkpoint=checkpoint)
    for resumed in (found, *(process["from one"] for process in both)):
        assert len(resumed["gradients"]) == 2
        assert losses(resumed) == pytest.approx(losses(alone), abs=TOLERANCE, rel=0)
        for gradient, wanted in zip(resumed["gradients"], alone["gradients"][4:], strict=True):
            torch.testing.assert_close(gradient, wanted, atol=TOLERANCE, rtol=0)
    ends = [load_file(base / name / "checkpoint-6" / "model.safetensors") for name in ("one", "two")]
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, atol=1e-5, rtol=0, msg=name)


def test_two_processes_repeat_a_run_and_go_on_with_it_to_the_bit(base: Path, both: list[dict[str, Any]]) -> None:
    """With noise, dropout, a temperature that falls, and accumulation."""
    expected = outcome(base / "noisy")
    assert find_checkpoints(base / "noisy")[0].name == f"checkpoint-{expected['steps']}"
    assert outcome(base / "again") == expected
    assert json.loads((base / "resumed" / "results.json").read_text())["resumed_at_steps"] == [4]
    assert outcome(base / "resumed") == expected


def test_the_model_goes_before_the_group_of_processes_is_closed(both: list[dict[str, Any]]) -> None:
    """In the other order the two may wait for each other for ever."""
    for process in both:
        assert len(process["copies at the end"]) > 10
        assert not any(process["copies at the end"])
        assert process["ends"] == ENDS


@pytest.mark.parametrize("learn_tau", ["scalar", "head"])
def test_sharded_by_fsdp2_takes_the_steps_of_a_copied_model(both: list[dict[str, Any]], learn_tau: str) -> None:
    """Straight-through Gumbel attention with learned temperatures; both ways draw the same noise."""
    for process in both:
        found = process["sharded by hand"][learn_tau]
        for sharded, copied in found["losses"]:
            assert sharded == pytest.approx(copied, abs=TOLERANCE)
        sharded, copied = found["weights"]
        assert sharded.keys() == copied.keys()
        taus = [name for name in copied if name.endswith("log_tau")]
        assert len(taus) == 2
        for name, weight in copied.items():
            torch.testing.assert_close(sharded[name], weight, atol=1e-5, rtol=0, msg=name)
        for name in taus:
            whole, part = found["shards"][name]
            assert whole == ((1,) if learn_tau == "scalar" else (2,))
            assert not torch.equal(copied[name], found["before"][name]), "the temperature is learned"
            assert sum(other["sharded by hand"][learn_tau]["shards"][name][1][0] for other in both) == whole[0]
            assert len(part) == 1


@pytest.mark.parametrize("learn_tau", ["scalar", "head"])
def test_a_sharded_model_is_saved_and_loaded(both: list[dict[str, Any]], learn_tau: str) -> None:
    for process in both:
        found = process["sharded by hand"][learn_tau]
        saved, restored = found["weights"][0], found["restored"]
        assert all(torch.equal(saved[name], restored[name]) for name in saved)
        assert found["third"][0] == found["third"][1], "optimiser state and weights: the next step is the same"
        assert all(torch.equal(found["after"][0][name], found["after"][1][name]) for name in saved)
        assert any(not torch.equal(found["after"][0][name], saved[name]) for name in saved)


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_the_script_runs_and_goes_on_under_accelerates_fsdp2(both: list[dict[str, Any]], kind: str) -> None:
    """Scheduled temperature; the same noise and data as copied by DistributedDataParallel."""
    for process in both:
        found = process[kind]
        assert found["sharded"] == [True, True], "two runs were sharded"
        assert losses(found["whole"], True) == pytest.approx(losses(found["copied"], True), abs=1e-5)
        assert found["again"] == found["whole"], "to the bit"


def test_a_sharded_run_with_learned_temperatures_is_saved_whole(
    base: Path, one: dict[str, Any], both: list[dict[str, Any]]
) -> None:
    """Checkpoints and model; what is loaded in one process gives the noise-free loss of the run."""
    assert all(process["learned"]["again"] == process["learned"]["whole"] for process in both)
    folder = base / "learned" / "whole"
    model = ga.from_pretrained(AutoModelForSequenceClassification, folder / "model").eval()
    learned = ga.patch_of(model).learned_tau_parameters()
    assert [tuple(log_tau.shape) for log_tau in learned] == [(2,), (2,)]
    assert all((log_tau != 0).any() for log_tau in learned), "the temperature was learned"
    for name, value in load_file(folder / "checkpoint-3" / "gumbel_attention.safetensors").items():
        assert torch.equal(model.get_parameter(name), value), name
    tokenizer = AutoTokenizer.from_pretrained(one["model_name_or_path"])
    rows = sentences(11)
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        loss = model(**batch, labels=torch.tensor([label for _, label in rows])).loss.item()
    evaluated = both[0]["learned"]["whole"]["evaluation"]
    assert loss == pytest.approx(next(e["loss"] for e in evaluated if e["mode"] == "noise_off"), abs=TOLERANCE)
