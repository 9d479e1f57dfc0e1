"""The parts of the benchmark: what it checks before it times, memory, targets, the attentions of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import benchmark
import gumbel_attention as ga
from harness import agreement, contenders, fresh, memory, timing, training_step
from harness.agreement import Verdict, disagreement
from harness.benchmark_report import LeftOut, Report, Row, Shape
from harness.contenders import ARMS, Contender, find_contenders
from harness.targets import BOTH, FORWARD, PRESETS, Target
from harness.timing import TOO_SLOW, Timing

CPU = torch.device("cpu")


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_right_ones_agree_on_every_case(arm: str, dtype: torch.dtype) -> None:
    verdicts = agreement.check([("blockwise", arm)], CPU, [dtype], [16], 64)
    assert [verdict.case for verdict in verdicts] == [
        case.name for case in agreement.cases(64, timed=True, dropout=True)
    ]
    assert [verdict.wrong for verdict in verdicts] == [None] * 5


@pytest.mark.parametrize(
    ("change", "found_in"),
    [
        ({"is_causal": False}, {"causal", "ragged, causal, grouped heads"}),
        ({"dropout_p": 0.0}, {"dropout"}),
        ({"seed": 2}, {"whole", "causal", "ragged", "ragged, causal, grouped heads", "dropout"}),
    ],
)
@pytest.mark.parametrize("arm", ["gumbel-soft", "gumbel-st"])
def test_each_fault_is_found_where_it_shows(
    arm: str, change: dict[str, Any], found_in: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ga.gumbel_attention

    def faulty(*args: Tensor, impl: str, **arguments: Any) -> Tensor:
        return real(*args, impl=impl, **{**arguments, **(change if impl == "blockwise" else {})})

    monkeypatch.setattr(ga, "gumbel_attention", faulty)
    verdicts = agreement.check([("blockwise", arm)], CPU, [torch.float32], [16], 64)
    assert {verdict.case for verdict in verdicts if verdict.wrong is not None} == found_in


def test_gradients_are_compared_although_a_choice_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query in 1024 has another output, which is let pass; the gradients of the others are wrong, which is not."""
    real, factor = ga.gumbel_attention, 1.0

    def faulty(*args: Tensor, impl: str, **arguments: Any) -> Tensor:
        output = real(*args, impl=impl, **arguments)
        if impl != "blockwise":
            return output
        moved = output.detach().clone()
        moved[0, 0, 5] += 9.0
        return moved + factor * (output - output.detach())

    monkeypatch.setattr(ga, "gumbel_attention", faulty)
    q, k, v = (torch.randn(1, 2, 512, 8) for _ in range(3))
    assert disagreement("blockwise", ARMS["gumbel-st"], q, k, v) is None
    factor = 1.1
    assert "dQ is off" in str(disagreement("blockwise", ARMS["gumbel-st"], q, k, v))


def test_comparing_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [("sdpa", "softmax"), ("no such", "softmax")]
    verdicts = agreement.check(methods, CPU, [torch.float32], [8], 32, processes=2)
    assert {verdict.wrong for verdict in verdicts if verdict.method == "sdpa softmax"} == {None}
    others = [str(verdict.wrong) for verdict in verdicts if verdict.method != "sdpa softmax"]
    assert len(others) == 5
    assert all("ValueError" in wrong and "no such" in wrong for wrong in others)
    monkeypatch.setattr(agreement, "LONGEST_CHECK", 0.01)
    (verdict,) = agreement.check(methods[:1], CPU, [torch.float32], [8], 32, processes=1)
    assert verdict == Verdict("sdpa softmax", "float32", 8, "all", "no result after 0.01 s")


def test_memory_is_what_a_run_holds() -> None:
    sizes = [20, 200, 0]
    for size, measured in zip(sizes, fresh.call("memory_control:hold", sizes), strict=True):
        assert abs(measured / 2**20 - size) < 3


def test_memory_of_a_gpu_is_its_peak_beyond_what_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
    assert memory.extra_bytes(lambda: calls.append("run"), torch.device("cuda")) == 250
    assert calls == ["synchronize", "empty_cache", "reset_peak_memory_stats", "run", "synchronize"]


def test_a_gpu_that_is_lost_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(ValueError, match="first"):
        timing.reason_of(ValueError("first"), torch.device("cuda"))


def test_a_fresh_process_that_fails_says_why() -> None:
    with pytest.raises(fresh.ProcessError, match=r"status 1: .*no_such_module"):
        fresh.call("no_such_module:f")


def reported(**settings: Any) -> Report:
    return Report({"preset": None, "commit": None, **settings}, CPU, "sdpa", {})


def test_targets_stand_next_to_their_figures() -> None:
    shape = Shape(2048, 64)
    samples = {
        "cpu gumbel-soft": (2.0, 3.0, 4.0),
        "sdpa": (2.0, 2.0, 2.0),
        "F.gumbel_softmax soft": (30.0, 24.0, 20.0),
    }
    report = reported(preset="cpu")
    report.times = [Row(name, shape, FORWARD, Timing(values)) for name, values in samples.items()]
    report.memory = [Row(n, Shape(16384, 64), BOTH, m) for n, m in (("sdpa", 200), ("cpu gumbel-st", 310))]
    found = {target.what: (report.ratio(target), target) for target in report.targets}
    ratio, target = found["cpu gumbel-soft over sdpa, forward, N=2048, d=64"]
    assert ratio is not None
    assert (ratio.median, target.bar, target.aim, target.met(ratio.median)) == (1.5, 2.0, 1.5, True)
    ratio, target = found["cpu gumbel-soft faster than F.gumbel_softmax soft, forward, N=2048, d=64"]
    assert ratio is not None  # 15, 8, 5
    assert (ratio.median, target.bar, target.aim, target.met(ratio.median)) == (8.0, 10.0, 18.0, False)
    ratio, target = found["extra memory, cpu gumbel-st over sdpa, forward+backward, N=16384, d=64"]
    assert ratio is not None
    assert (ratio.median, target.met(ratio.median)) == (1.55, False)
    assert found["training step, gumbel-st over unpatched"][0] is None
    table = report._target_table()
    assert "| 8.00 (6.50-11.50) | >= 10 (aim 18) | MISSED |" in table
    assert "| training step, gumbel-st over unpatched | - | <= 1.25 (aim 1.1) | not measured |" in table


@pytest.mark.parametrize("name", PRESETS)
def test_presets_measure_what_their_targets_ask_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    options = benchmark.parse_options(["--preset", name])
    preset = PRESETS[name]
    assert set(preset.settings) <= set(vars(options))  # no setting that is no option
    timed = set(benchmark.shapes(options))
    arms = {f"{impl} {arm}" for impl in ga.dispatch.IMPLEMENTATIONS for arm in ARMS}
    others = {contender.name for contender in contenders._others(torch.device(options.device))}
    for target in preset.targets:
        if target.kind == "step":
            assert {target.method, target.over} <= {training_step.UNPATCHED, *training_step.PATCHED_ARMS}
        else:
            assert {target.method, target.over} <= arms | others
        if target.kind == "time":
            assert Shape(target.length, target.head_dim) in timed
        if target.kind == "memory":
            assert target.length in options.memory_lengths
            assert target.head_dim == options.head_dims[0]


def test_the_bars_of_the_h100() -> None:
    bars = {(t.method, t.direction, t.head_dim): t.bar for t in PRESETS["h100"].targets}
    assert bars["triton gumbel-soft", FORWARD, 64] == 2.0
    assert bars["triton gumbel-st", FORWARD, 128] == 1.2
    assert bars["triton gumbel-st", BOTH, 128] == 1.65
    assert bars["triton det-st", FORWARD, 128] == 1.0
    assert {t.over for t in PRESETS["h100"].targets} == {"sdpa-flash"}


def test_an_option_beats_its_preset() -> None:
    options = benchmark.parse_options(["--preset", "cpu", "--threads", "1", "--rounds", "5"])
    assert (options.rounds, options.memory_lengths) == (5, [16384])


def test_a_faster_ratio_is_met_from_above() -> None:
    at_most, at_least = (Target("time", "a", "b", 2.0, faster=faster) for faster in (False, True))
    assert (at_most.met(1.9), at_most.met(2.1)) == (True, False)
    assert (at_least.met(1.9), at_least.met(2.1)) == (False, True)


def test_flash_is_the_baseline_where_it_runs() -> None:
    def field(*names: str) -> contenders.Field:
        return contenders.Field([Contender(name, contenders.eager) for name in names], {})

    assert field("sdpa", "sdpa-flash").baseline == "sdpa-flash"
    assert field("sdpa", "sdpa-cudnn").baseline == "sdpa"


def test_the_attentions_of_others_agree_without_noise_and_sample_with_it() -> None:
    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    found = {contender.name: contender for contender in find_contenders(CPU, torch.float32).contenders}
    for causal in (False, True):
        want = found["sdpa"].attention(q, k, v, causal)
        torch.testing.assert_close(found["eager softmax"].attention(q, k, v, causal), want)
        hard = found["F.gumbel_softmax hard"].attention(q, k, v, causal)
        taken = (hard[..., None, :] - v[..., None, :, :]).abs().amax(-1) < 1e-5  # queries x keys
        assert taken.any(-1).all()
        assert not causal or not taken.triu(1).any()


def test_x_transformers_takes_one_value_straight_through() -> None:
    pytest.importorskip("einops")
    if "x-transformers" in find_contenders(CPU, torch.float32).absent:
        pytest.skip("x-transformers is not installed")
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    output = contenders.x_transformers_attention(q, k, v, True)
    taken = (output[..., None, :] - v[..., None, :, :]).abs().amax(-1) < 1e-5
    assert taken.any(-1).all()
    assert not taken.triu(1).any()
    assert torch.autograd.grad(output.square().sum(), q)[0].abs().max() > 0


def test_left_out_cells_of_a_method_share_a_line() -> None:
    report = reported(rounds=3, heads=1, dtype="float32", memory_heads=1)
    report.left_out = [LeftOut("a", Shape(n, 64), FORWARD, TOO_SLOW) for n in (8, 16)]
    note = report._note({"settings": report.settings, "versions": {"torch": ""}, "device": "", "num_threads": 1,
                         "absent": {}, "not_done": {}})  # fmt: skip
    assert "- a, too slow: forward N=8, d=64; forward N=16, d=64" in note
