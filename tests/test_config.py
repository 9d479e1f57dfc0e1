"""The configuration object."""

import dataclasses
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
        ({"eval_hard": 1}, TypeError, "eval_hard must be None, True or False, got 1"),
        ({"eval_hard": 0}, TypeError, "got 0"),
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


def test_the_import_is_light() -> None:
    heavy = "[m for m in ('transformers', 'triton', 'torch._inductor', 'scipy') if m in sys.modules]"
    code = f"import sys; import torch; before = {heavy}; import gumbel_attention; assert {heavy} == before"
    subprocess.run([sys.executable, "-c", code], check=True)
