from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import results as harness_results
from harness.arguments import FinetuneArguments
from harness.loop import isolated_rng, make_optimizer, steps_per_epoch, total_steps
from harness.results import environment, git_state, peak_memory_bytes, read_results, write_results


def test_results_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, {"steps": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_results(tmp_path, {"loss": math.nan})

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_results(tmp_path, {"steps": 2})
    assert read_results(tmp_path) == {"schema_version": 1, "status": "finished", "steps": 1}
    assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize("content", [None, "", '{"status": "fini', "[]", '{"status": "running"}', "{}"])
def test_only_a_finished_file_counts(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert read_results(tmp_path) is None


def test_environment_is_complete_and_json() -> None:
    found = environment(torch.device("cpu"), 1)
    assert json.loads(json.dumps(found)) == found
    assert found["device"].startswith("cpu")
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) == {
        "python",
        "torch",
        "transformers",
        "datasets",
        "accelerate",
        "gumbel_attention",
    }
    assert peak_memory_bytes(torch.device("cpu")) > 1e7


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None

    def git(*command: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert git_state(tmp_path) is None
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {"commit": state["commit"], "dirty": True}


def test_git_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(harness_results.subprocess, "run", missing)
    assert git_state(tmp_path) is None


def test_isolated_rng_repeats_and_leaves_no_trace() -> None:
    cpu = torch.device("cpu")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    draws = []
    for entropy in ((0, 5), (0, 5), (0, 6), (5, 0)):
        with isolated_rng(cpu, *entropy):
            draws.append(torch.rand(2))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[2], draws[3])
    assert torch.equal(torch.rand(3), expected)


def test_number_of_steps() -> None:
    args = FinetuneArguments(train_file="a", validation_file="b", gradient_accumulation_steps=4, num_train_epochs=3)
    assert (steps_per_epoch(args, 9), total_steps(args, 9)) == (3, 9)
    args = FinetuneArguments(train_file="a", validation_file="b", max_train_steps=5)
    assert total_steps(args, 9) == 5


def test_weight_decay_spares_vectors_and_learned_temperatures() -> None:
    model = torch.nn.Linear(3, 3)
    tau = torch.nn.Parameter(torch.ones(2, 2))
    model.register_parameter("tau", tau)
    args = FinetuneArguments(train_file="a", validation_file="b", weight_decay=0.3)
    decayed, spared = make_optimizer(model, args, undecayed=[tau]).param_groups
    assert decayed["weight_decay"] == 0.3
    assert spared["weight_decay"] == 0.0
    assert [id(parameter) for parameter in decayed["params"]] == [id(model.weight)]
    assert {id(parameter) for parameter in spared["params"]} == {id(model.bias), id(tau)}
