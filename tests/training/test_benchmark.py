"""The benchmark: ratios within rounds, files written, and no speed for an implementation that is wrong."""

import json
from pathlib import Path

import pytest
import torch

import benchmark
import gumbel_attention as ga
from gumbel_attention.dispatch import Implementation
from harness import timing, training_step
from harness.contenders import ARMS, disagreement
from harness.models import load_classifier

CPU = torch.device("cpu")


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"base": iter([9.0, 1.0, 2.0, 4.0]), "other": iter([9.0, 2.0, 6.0, 8.0])}
    monkeypatch.setattr(timing, "_time", lambda method, device: next(clock[method()]))
    timings = timing.compare({"base": lambda: "base", "other": lambda: "other"}, "base", 3, CPU)
    assert timings["base"].ratio == 1.0
    assert (timings["other"].seconds, timings["other"].ratio) == (6.0, 2.0)
    assert (timings["other"].low, timings["other"].high) == (2.0, 2.5)


def test_too_few_rounds_and_an_unknown_baseline_are_refused() -> None:
    for rounds, baseline in ((2, "a"), (3, "b")):
        with pytest.raises(ValueError, match="at least 3 rounds and a baseline"):
            timing.compare({"a": lambda: None}, baseline, rounds, CPU)


def run(folder: Path) -> int:
    shape = ["--lengths", "32", "--head_dims", "8", "--heads", "2", "--rounds", "3"]
    return benchmark.main([*shape, "--threads", "1", "--device", "cpu", "--output_dir", str(folder)])


def test_it_writes_table_plot_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "CHECK_LENGTH", 32)
    assert run(tmp_path) == 0
    content = json.loads((tmp_path / "benchmark.json").read_text())
    methods = {row["method"] for row in content["rows"]}
    assert {"sdpa", "F.gumbel_softmax hard", "blockwise gumbel-st", "reference gumbel-soft"} <= methods
    assert content["versions"]["torch"] == torch.__version__
    assert "blockwise gumbel-st" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


def test_a_wrong_implementation_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "CHECK_LENGTH", 32)
    right = ga.dispatch.IMPLEMENTATIONS["blockwise"]
    wrong = Implementation(lambda problem: 1.01 * right.attention(problem), right.unsupported)
    monkeypatch.setitem(ga.dispatch.IMPLEMENTATIONS, "blockwise", wrong)
    assert run(tmp_path) == 1
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(content["wrong"]) == {f"blockwise {arm}" for arm in ARMS}
    assert not any(row["method"].startswith("blockwise") for row in content["rows"])


def test_the_training_steps_do_what_their_names_say(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_dropout(*args: object, **kwargs: object) -> torch.nn.Module:
        model = load_classifier(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    monkeypatch.setattr(training_step, "load_classifier", without_dropout)
    steps = training_step.training_steps(bert, batch=4, length=8, device=CPU)
    losses = {name: step().item() for name, step in steps.items()}
    assert losses["softmax"] == pytest.approx(losses["unpatched"], abs=1e-7)
    assert len({losses["softmax"], losses["gumbel-soft"], losses["gumbel-st"]}) == 3
    assert steps["unpatched"]().item() != losses["unpatched"]  # the weights moved


@pytest.mark.parametrize("arm", ARMS)
def test_the_right_ones_agree(arm: str) -> None:
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    assert disagreement("blockwise", ARMS[arm], q, k, v) is None
