"""The configuration object and the temperature schedules."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys

import pytest

import gumbel_attention as ga


def test_round_trip_through_json() -> None:
    config = ga.GumbelAttentionConfig(tau=0.5, hard=True, noise="normal", layers=[0, -1, "*.attn"], heads=[1])
    restored = ga.GumbelAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert restored.layers == (0, -1, "*.attn")


def test_it_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(ga.GumbelAttentionConfig(), "tau", 2.0)  # noqa: B010 - a plain assignment is a type error


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, "tau must be a finite number > 0, got 0.0"),
        ({"tau": -1}, ValueError, "got -1"),
        ({"tau": math.nan}, ValueError, "got nan"),
        ({"tau": math.inf}, ValueError, "got inf"),
        ({"tau": "1"}, TypeError, "of type str"),
        ({"tau": True}, TypeError, "of type bool"),
        ({"noise_scale": -0.1}, ValueError, "noise_scale must be a finite number >= 0"),
        ({"noise": "gumbl"}, ValueError, "Did you mean 'gumbel'"),
        ({"noise": None}, ValueError, "noise must be one of"),
        ({"hard": 1}, TypeError, "True or False"),
        ({"hard": True, "estimator": "straigth_through"}, ValueError, "Did you mean 'straight_through'"),
        ({"estimator": "straight_through"}, ValueError, "needs hard=True"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"learn_tau": "layer"}, ValueError, "learn_tau must be one of"),
        ({"eval_hard": "no"}, TypeError, "eval_hard"),
        ({"eval_noise": 1}, TypeError, "eval_noise"),
        ({"layers": []}, ValueError, "empty selection"),
        ({"layers": [1.5]}, TypeError, "layers must hold int or str"),
        ({"heads": ["0"]}, TypeError, "heads must hold int"),
    ],
)
def test_bad_settings(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ga.GumbelAttentionConfig(**settings)  # type: ignore[arg-type]


def test_unknown_keys_and_versions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown settings \['temprature'\]; known are"):
        ga.GumbelAttentionConfig.from_dict({"temprature": 1.0})
    with pytest.raises(ValueError, match="noise_version 2"):
        ga.GumbelAttentionConfig.from_dict({"noise_version": 2})


@pytest.mark.parametrize("kind", ["linear", "exponential", "cosine", "step"])
def test_schedules_run_from_start_to_end_and_stay(kind: str) -> None:
    tau = ga.temperature_schedule(kind, 2.0, 0.5, 100)
    values = [tau(step) for step in range(120)]
    assert values[0] == pytest.approx(2.0)
    assert values[100:] == pytest.approx([0.5] * 20)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


def test_schedules_at_half_way() -> None:
    half = {kind: ga.temperature_schedule(kind, 2.0, 0.5, 100)(50) for kind in ("linear", "exponential", "cosine")}
    assert half == pytest.approx({"linear": 1.25, "exponential": 1.0, "cosine": 1.25})
    stairs = ga.temperature_schedule("step", 2.0, 0.5, 100, drops=2)
    assert [stairs(s) for s in (0, 49, 50, 99, 100)] == pytest.approx([2.0, 2.0, 1.0, 1.0, 0.5])
    assert ga.temperature_schedule("constant", 0.7)(10**6) == 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linaer", 1.0, 0.5, 10), "Did you mean 'linear'"),
        (("linear", 0.0, 0.5, 10), "start must be"),
        (("linear", 1.0, -1.0, 10), "end must be"),
        (("linear", 1.0, 0.5, 0), "steps must be an integer >= 1"),
        (("constant", 1.0, 0.5, 10), "one temperature"),
    ],
)
def test_bad_schedules(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ga.temperature_schedule(*arguments)  # type: ignore[arg-type]


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step must be >= 0"):
        ga.temperature_schedule("linear", 1.0, 0.5, 10)(-1)


def test_the_import_is_light() -> None:
    heavy = "[m for m in ('transformers', 'triton', 'torch._inductor', 'scipy') if m in sys.modules]"
    code = f"import sys; import torch; before = {heavy}; import gumbel_attention; assert {heavy} == before"
    subprocess.run([sys.executable, "-c", code], check=True)
