"""The benchmark: ratios within rounds, files written, no speed for what is wrong, and all that is left out named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmark
import gumbel_attention as ga
from gumbel_attention.dispatch import Implementation
from harness import contenders, timing, training_step
from harness.contenders import ARMS
from harness.models import load_classifier
from harness.targets import BOTH, FORWARD
from harness.timing import OUT_OF_MEMORY, TOO_SLOW, Timing

CPU = torch.device("cpu")


def clocked(monkeypatch: pytest.MonkeyPatch, **clock: list[float]) -> None:
    """Each method, which returns its name, takes the next of these times."""
    times: dict[str, Iterator[float]] = {name: iter(values) for name, values in clock.items()}
    monkeypatch.setattr(timing, "_time", lambda method, repeats, device: next(times[method()]))


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch, base=[9.0, 9.0, 1.0, 2.0, 4.0], other=[9.0, 9.0, 2.0, 6.0, 8.0])
    found = timing.compare({"base": lambda: "base", "other": lambda: "other"}, 3, CPU).timings
    assert found["other"].seconds == 6.0
    ratio = found["other"].over(found["base"])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.5)
    faster = found["base"].over(found["other"])  # 1/2, 1/3, 1/2
    assert (faster.median, faster.high) == (0.5, 0.5)


def test_timings_of_other_rounds_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Timing((1.0, 2.0, 3.0)).over(Timing((1.0, 2.0)))


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 rounds"):
        timing.compare({"a": lambda: None}, 2, CPU)


def test_short_runs_are_repeated_within_a_sample() -> None:
    runs: list[int] = []
    found = timing.compare({"quick": lambda: runs.append(0)}, 3, CPU, sample_seconds=1e-3)
    assert len(runs) > 2 + 3 * 5
    assert found.timings["quick"].seconds < 1e-3 / 5  # of one run, not of the sample


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_method_that_runs_out_of_memory_loses_its_cell_only(fails_at: int) -> None:
    calls: list[int] = []

    def greedy() -> Tensor:
        calls.append(0)
        return torch.empty(2**60 if len(calls) >= fails_at else 1)

    found = timing.compare({"base": lambda: None, "greedy": greedy, "last": lambda: None}, 3, CPU)
    assert found.left_out == {"greedy": OUT_OF_MEMORY}
    assert set(found.timings) == {"base", "last"}
    assert {len(timed.samples) for timed in found.timings.values()} == {3}


def test_errors_are_told_apart() -> None:
    assert timing.reason_of(torch.cuda.OutOfMemoryError("CUDA out of memory"), CPU) == OUT_OF_MEMORY
    assert timing.reason_of(RuntimeError("no kernel\nand more"), CPU) == "RuntimeError: no kernel"


def test_a_method_over_the_time_limit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch, base=[9.0, 1.0, 1.0, 1.0, 1.0], slow=[9.0, 2.0])
    found = timing.compare({"base": lambda: "base", "slow": lambda: "slow"}, 3, CPU, time_limit=5.0)
    assert (found.left_out, set(found.timings)) == ({"slow": TOO_SLOW}, {"base"})
    assert found.single["slow"] == 2.0


def run(folder: Path, *more: str) -> int:
    shape = ["--lengths", "32", "--head_dims", "8", "--heads", "2", "--rounds", "3"]
    return benchmark.main([*shape, "--threads", "1", "--device", "cpu", "--output_dir", str(folder), *more])


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "CHECK_LENGTH", 32)
    monkeypatch.setattr(benchmark, "SAMPLE_SECONDS", 0.0)


def content_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "benchmark.json").read_text())
    return content


@pytest.mark.usefixtures("short")
def test_it_writes_table_plot_and_json(tmp_path: Path) -> None:
    assert run(tmp_path, "--causal", "--commit", "abc") == 0
    content, table = content_of(tmp_path), (tmp_path / "table.md").read_text()
    methods = {row["method"] for row in content["times"]}
    assert {"sdpa", "F.gumbel_softmax hard", "blockwise gumbel-st", "reference gumbel-soft"} <= methods
    assert {(row["causal"], row["direction"]) for row in content["times"]} == {
        (causal, direction) for causal in (False, True) for direction in (FORWARD, BOTH)
    }
    assert {len(row["samples"]) for row in content["times"]} == {3}
    assert content["versions"]["torch"] == torch.__version__
    assert content["finished"]
    assert content["machine"]["processor"]
    assert "blockwise gumbel-st" in table
    assert "N=32, d=8, causal" in table
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


@pytest.mark.usefixtures("short")
def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> Tensor:
        raise ModuleNotFoundError("x_transformers", name="x_transformers")

    monkeypatch.setattr(contenders, "x_transformers_attention", missing)
    monkeypatch.setattr("benchmark.free_bytes", lambda device: 2 * (8 * 2 * 32 * 32 * 4))
    assert run(tmp_path, "--methods", "x-*", "F.*") == 0
    table = (tmp_path / "table.md").read_text()
    assert "- x-transformers: x_transformers is not installed" in table
    left_out = f"- F.gumbel_softmax hard, {benchmark.NO_FIT}: forward N=32, d=8; forward+backward N=32, d=8"
    assert left_out in table
    assert {row["method"] for row in content_of(tmp_path)["times"]} == {"sdpa", "F.gumbel_softmax soft"}


@pytest.mark.usefixtures("short")
def test_the_time_of_a_longer_shape_is_foretold(tmp_path: Path) -> None:
    lengths = ["--lengths", "32", "1024", "--head_dims", "8", "--methods", "reference gumbel-*"]
    assert run(tmp_path, *lengths, "--time_limit", "0.5") == 0
    left_out = [cell for cell in content_of(tmp_path)["left_out"] if cell["reason"] == TOO_SLOW]
    assert {(cell["method"], cell["length"]) for cell in map(flat, left_out)} >= {("reference gumbel-soft", 1024)}
    assert all(cell["detail"] == "as shorter ones were" for cell in left_out)


def flat(cell: dict[str, Any]) -> dict[str, Any]:
    return {**cell, **cell["shape"]}


@pytest.mark.usefixtures("short")
def test_what_comes_after_the_total_limit_is_named(tmp_path: Path) -> None:
    assert run(tmp_path, "--total_limit", "0", "--methods", "eager*") == 0
    content = content_of(tmp_path)
    assert content["not_done"] == {"times of N=32, d=8": "more than 0 s had passed"}
    assert (content["times"], content["finished"]) == ([], True)


@pytest.mark.usefixtures("short")
def test_a_run_that_is_cut_off_keeps_its_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark.Benchmark, "measure_memory", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--methods", "eager*")
    content = content_of(tmp_path)
    assert {row["method"] for row in content["times"]} == {"sdpa", "eager softmax"}
    assert not content["finished"]
    assert "This run has not finished." in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("short")
def test_a_wrong_implementation_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ga.dispatch.IMPLEMENTATIONS["blockwise"]
    wrong = Implementation(lambda problem: 1.01 * right.attention(problem), right.unsupported)
    monkeypatch.setitem(ga.dispatch.IMPLEMENTATIONS, "blockwise", wrong)
    assert run(tmp_path, "--methods", "blockwise *", "eager*") == 1
    content = content_of(tmp_path)
    failed = {verdict["method"] for verdict in content["checks"] if verdict["wrong"] is not None}
    assert failed == {f"blockwise {arm}" for arm in ARMS}
    assert {row["method"] for row in content["times"]} == {"sdpa", "eager softmax"}
    assert "WRONG" in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("short")
def test_an_implementation_wrong_where_it_is_not_timed_still_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ga.dispatch.IMPLEMENTATIONS["blockwise"]

    def attention(problem: Any) -> Tensor:
        if problem.query.dtype == torch.float16:
            raise RuntimeError("no such instruction")
        return right.attention(problem)

    monkeypatch.setitem(ga.dispatch.IMPLEMENTATIONS, "blockwise", Implementation(attention, right.unsupported))
    assert run(tmp_path, "--methods", "blockwise softmax", "--check_dtypes", "float16") == 1
    content = content_of(tmp_path)
    assert all("float16" in line and "RuntimeError: no such instruction" in line for line in content["wrong"])
    assert content["wrong"]
    assert {row["method"] for row in content["times"]} == {"sdpa", "blockwise softmax"}


@pytest.mark.usefixtures("short")
def test_memory_of_every_method_is_in_the_table(tmp_path: Path) -> None:
    more = ["--memory_lengths", "1024", "--methods", "F.gumbel_softmax soft"]
    assert run(tmp_path, *more) == 0
    held = {(row["method"], row["direction"]): row["extra_bytes"] for row in content_of(tmp_path)["memory"]}
    scores = 4 * 1024**2
    assert held["F.gumbel_softmax soft", FORWARD] > 2 * scores
    assert held["F.gumbel_softmax soft", BOTH] < 14 * scores
    assert held["sdpa", BOTH] < scores
    assert "extra MiB" in (tmp_path / "table.md").read_text()


def without_dropout(*args: Any, **kwargs: Any) -> torch.nn.Module:
    model = load_classifier(*args, **kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_the_training_steps_do_what_their_names_say(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "load_classifier", without_dropout)
    steps = training_step.training_steps(bert, batch=4, length=8, device=CPU)
    losses = {name: step().item() for name, step in steps.items()}
    assert losses["softmax"] == pytest.approx(losses["unpatched"], abs=1e-7)
    assert len({losses["softmax"], losses["gumbel-soft"], losses["gumbel-st"]}) == 3
    assert steps["unpatched"]().item() != losses["unpatched"]  # the weights moved


def test_a_training_step_in_bfloat16_with_an_implementation_by_name(
    bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_step, "load_classifier", without_dropout)
    used: list[tuple[str, torch.dtype]] = []
    right = ga.dispatch.IMPLEMENTATIONS["blockwise"]

    def attention(problem: Any) -> Tensor:
        used.append(("blockwise", problem.query.dtype))
        return right.attention(problem)

    monkeypatch.setitem(ga.dispatch.IMPLEMENTATIONS, "blockwise", Implementation(attention, right.unsupported))
    impls = {"gumbel-st": "blockwise"}
    steps = training_step.training_steps(bert, 4, 8, CPU, torch.bfloat16, impls, arms=["softmax", "gumbel-st"])
    assert list(steps) == ["unpatched", "softmax", "gumbel-st, impl='blockwise'"]
    assert all(step().isfinite() for step in steps.values())
    assert used == [("blockwise", torch.bfloat16)] * 2  # layers


@pytest.mark.usefixtures("short")
def test_a_model_that_is_not_there_costs_its_table_only(tmp_path: Path) -> None:
    assert run(tmp_path, "--methods", "eager*", "--model", str(tmp_path / "none")) == 0
    content = content_of(tmp_path)
    assert "cannot be loaded" in content["not_done"]["training step"]
    assert content["times"]
