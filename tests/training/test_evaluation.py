"""Ways to evaluate one model."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import gumbel_attention as ga
from harness.arguments import FinetuneArguments
from harness.attention import attention_config, control_attention
from harness.errors import UsageError
from harness.evaluation import SampleMean, evaluation_mode, evaluation_modes, sampling
from models import build, logits

FILES: dict[str, Any] = {"train_file": "a.tsv", "validation_file": "b.tsv"}


class Named(NamedTuple):
    logits: Tensor
    picks: int


class Sampled(nn.Module):
    """Gives the logits of one row after the other."""

    def __init__(self, rows: Tensor, named: bool) -> None:
        super().__init__()
        self.rows, self.named, self.calls = rows, named, 0

    def forward(self, shift: float, *, picks: int) -> Any:
        row = self.rows[self.calls] + shift
        self.calls += 1
        return Named(row, picks) if self.named else SequenceClassifierOutput(logits=row)


@pytest.mark.parametrize("named", [True, False])
def test_mean_of_samples_is_the_mean_of_their_probabilities(named: bool) -> None:
    rows = 3.0 * torch.randn(5, 2, 7)
    model = Sampled(rows, named)
    output = SampleMean(model, 5)(0.5, picks=4)
    assert model.calls == 5
    torch.testing.assert_close(output.logits.exp(), rows.softmax(-1).mean(0))
    assert not torch.allclose(output.logits.exp(), rows.mean(0).softmax(-1), atol=0.05)  # of the logits: the control
    if named:
        assert output.picks == 4


def test_one_sample_is_the_model_itself() -> None:
    model = nn.Linear(1, 1)
    assert sampling(model, evaluation_mode("noise_on")) is model
    assert sampling(model, evaluation_mode("mean_1")) is model
    mean = sampling(model, evaluation_mode("mean_16"))
    assert isinstance(mean, SampleMean)
    assert mean.samples == 16


@pytest.mark.parametrize("names", [["noise_of"], ["mean_0"], ["mean_"], ["mean_-1"], [3], [], ["hard", "hard"]])
def test_modes_that_do_not_exist_are_refused(names: list[Any]) -> None:
    with pytest.raises(UsageError, match="eval_modes"):
        evaluation_modes(names)
    with pytest.raises(UsageError, match="eval_modes"):
        FinetuneArguments(**FILES, eval_modes=tuple(names))


def control(**settings: Any) -> tuple[Any, Any]:
    args = FinetuneArguments(**FILES, **settings)
    model = build("bert").eval()
    return model, control_attention(model, args, attention_config(args), 10)


def in_mode(model: Any, attention: Any, mode: str) -> Tensor:
    torch.manual_seed(1)
    with attention.evaluating(evaluation_mode(mode)):
        result: Tensor = logits(model)
    return result


@pytest.mark.parametrize("arm", [{"hard": False}, {"hard": True}, {"hard": False, "noise": "none"}])
def test_each_mode_is_what_its_name_says(arm: dict[str, Any]) -> None:
    model, attention = control(**arm)
    now = {mode: in_mode(model, attention, mode) for mode in ("noise_off", "noise_on", "hard", "soft")}
    for mode, settings in (
        ("hard", {"hard": True, "noise": "none"}),
        ("soft", {"hard": False, "noise": "none"}),
        ("noise_on", {"hard": arm["hard"], "noise": "gumbel", "eval_noise": True}),
        ("noise_off", {"hard": arm["hard"], "noise": "none"}),
    ):
        other = build("bert").eval()
        ga.patch_model(other, ga.GumbelAttentionConfig(**settings))
        torch.manual_seed(1)
        assert torch.equal(now[mode], logits(other)), mode
    assert not torch.equal(now["hard"], now["soft"])
    assert not torch.equal(now["noise_on"], now["noise_off"])
    assert torch.equal(in_mode(model, attention, "noise_off"), now["noise_off"])  # the state came back


def test_the_default_is_noise_off_and_on_and_a_plain_model_has_one_mode() -> None:
    assert [mode.name for mode in control()[1].evaluation_modes()] == ["noise_off", "noise_on"]
    assert [mode.name for mode in control(eval_modes=("hard", "mean_4"))[1].evaluation_modes()] == ["hard", "mean_4"]
    assert [mode.name for mode in control(attention="unpatched")[1].evaluation_modes()] == ["noise_off"]


def test_evaluations_before_the_last_may_use_fewer_modes() -> None:
    attention = control(eval_modes=("hard", "mean_4", "noise_off"), eval_modes_between=("noise_off",))[1]
    assert [mode.name for mode in attention.evaluation_modes(last=False)] == ["noise_off"]
    assert [mode.name for mode in attention.evaluation_modes()] == ["hard", "mean_4", "noise_off"]
    assert len(control(eval_modes=("hard", "soft"))[1].evaluation_modes(last=False)) == 2
    for between in (("soft",), (), ("noise_off", "noise_off")):
        with pytest.raises(UsageError, match="eval_modes"):
            FinetuneArguments(**FILES, eval_modes=("noise_off", "hard"), eval_modes_between=between)


def test_the_noise_scale_follows_the_step() -> None:
    _, attention = control(noise_scale=2.0, noise_scale_end=0.0)
    scales = []
    for step in (0, 3, 9, 10):
        attention.set_step(step)
        (scale,) = {state.noise_scale.item() for state in attention.patch._states}
        scales.append(scale)
    assert scales == pytest.approx([2.0, 2.0 * 6 / 9, 0.0, 0.0])
    _, fixed = control(noise_scale=2.0)
    fixed.set_step(9)
    assert {state.noise_scale.item() for state in fixed.patch._states} == {2.0}


def test_a_noise_scale_without_noise_is_refused() -> None:
    for settings in ({"noise": "none"}, {"noise_scale": 0.0}):
        with pytest.raises(UsageError, match="noise_scale_end"):
            FinetuneArguments(**FILES, noise_scale_end=0.5, **settings)
