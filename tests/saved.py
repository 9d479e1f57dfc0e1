"""Models with settings worth saving, and changes of the files they are saved in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gumbel_attention as ga
from models import build

KEY = "gumbel_attention"
QUIET: dict[str, Any] = {"noise": "none"}
SCHEDULED = ga.GumbelAttentionConfig(tau=0.5, hard=True, **QUIET)
GROUPS = [
    ga.GumbelAttentionConfig(hard=True, learn_tau="head", layers=(0,), **QUIET),
    ga.GumbelAttentionConfig(learn_tau="scalar", layers=(1,), **QUIET),
]


def learned(name: str = "bert") -> tuple[Any, ga.ModelPatch]:
    """A model with a learned temperature per head in one layer and one for all heads in the other, both moved."""
    model = build(name)
    patch = ga.patch_model(model, GROUPS)
    with torch.no_grad():
        for parameter in patch.learned_tau_parameters():
            parameter.uniform_(-1, 1)
    return model, patch


def entry(folder: Path) -> Any:
    """What the config.json in a folder says of Gumbel attention."""
    return json.loads((folder / "config.json").read_text()).get(KEY)


def change_entry(folder: Path, change: Callable[[Any], object]) -> None:
    """Changes what it says."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content[KEY])
    path.write_text(json.dumps(content))
