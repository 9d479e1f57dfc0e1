"""Sharded training (FSDP2) on two processes without a GPU."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from interrupted import start
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification

import gumbel_attention as ga

WHOLE = StateDictOptions(full_state_dict=True)
LEARNED = ("scalar", "head")


def batch_of_this_process() -> dict[str, torch.Tensor]:
    """Four examples of ten tokens with labels, others on every process."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    tokens = torch.randint(4, 16, (4, 10), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 2}


class Run:
    """A tiny classifier with straight-through Gumbel attention and learned temperatures on two processes.

    Args:
        bare: what both kinds train a copy of.
        learn_tau: shape of the learned temperatures.
        sharded: by FSDP2, layer by layer; else copied by DistributedDataParallel.
    """

    def __init__(self, bare: torch.nn.Module, learn_tau: str, sharded: bool) -> None:
        model: Any = copy.deepcopy(bare)
        ga.patch_model(model, ga.GumbelAttentionConfig(tau=0.8, hard=True, learn_tau=learn_tau))
        if sharded:
            mesh = torch.distributed.init_device_mesh("cpu", (2,))
            for layer in model.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        self.model: Any = model if sharded else DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def step(self, number: int) -> float:
        """One step with the noise of this process and step; its loss."""
        torch.manual_seed(1000 * number + torch.distributed.get_rank())
        self.optimizer.zero_grad()
        loss = self.model.train()(**batch_of_this_process()).loss
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights, whole."""
        state = getattr(self.model, "module", self.model).state_dict()
        return {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in state.items()}


def train_sharded_by_hand(encoder: str, file: Path) -> dict[str, Any]:
    """Three steps sharded and copied; two sharded, saved in a file, loaded into another model, and the third there."""
    results: dict[str, Any] = {}
    torch.manual_seed(0)
    bare = AutoModelForSequenceClassification.from_pretrained(encoder)
    for learn_tau in LEARNED:
        sharded, copied, loaded = (Run(bare, learn_tau, kind) for kind in (True, False, True))
        before = copied.weights()
        losses = [(sharded.step(number), copied.step(number)) for number in (1, 2)]
        weights = sharded.weights(), copied.weights()
        states = get_state_dict(sharded.model, sharded.optimizer, options=WHOLE)
        if torch.distributed.get_rank() == 0:
            torch.save(states, file)
        torch.distributed.barrier()
        model, optimizer = torch.load(file)
        torch.distributed.barrier()
        set_state_dict(
            loaded.model, loaded.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=WHOLE
        )
        results[learn_tau] = {
            "before": before,
            "losses": losses,
            "weights": weights,
            "restored": loaded.weights(),
            "third": (sharded.step(3), loaded.step(3)),
            "after": (sharded.weights(), loaded.weights()),
            "shards": {
                name: (tuple(x.shape), tuple(x.to_local().shape)) for name, x in sharded.model.named_parameters()
            },
        }
    return results


@contextmanager
def sharding_on_cpu(kind: str) -> Iterator[list[bool]]:
    """Has Accelerate use its FSDP2 engine on a CPU, where it would copy the model without a word.

    The list tells of every model that the engine prepared whether it was sharded.
    """
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
        "FSDP_STATE_DICT_TYPE": kind,
    }
    initialise, seen = AcceleratorState.__init__, []

    def shard(self: Any, *args: Any, **options: Any) -> None:
        initialise(self, *args, **options)
        plugin = options.get("fsdp_plugin")
        if plugin is None:
            return
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = plugin
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)

    def prepare(accelerator: Any, model: Any) -> Any:
        prepared = sharding(accelerator, model)
        seen.append(isinstance(prepared, FSDPModule) and any(isinstance(x, DTensor) for x in prepared.parameters()))
        return prepared

    from accelerate import accelerator as module

    sharding = module.fsdp2_prepare_model
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(AcceleratorState, "__init__", shard),
        mock.patch.object(module, "fsdp2_prepare_model", prepare),
    ):
        yield seen


def train_sharded(settings: dict[str, Any], folder: Path, kind: str) -> dict[str, Any]:
    """The script's own run under Accelerate's FSDP2: whole, and gone on from a checkpoint; noise on."""
    changes = {"hard": True, "tau_schedule": "linear", "tau_end": 0.5}
    with sharding_on_cpu(kind) as seen:
        whole = start(settings, **changes, output_dir=str(folder / "whole"), checkpointing_steps=1, keep_last=None)
        checkpoint = str(folder / "whole" / "checkpoint-4")
        again = start(settings, **changes, output_dir=str(folder / "again"), resume_from_checkpoint=checkpoint)
    copied = start(settings, **changes, output_dir=str(folder / "copied"))
    runs = {"whole": whole, "again": again, "copied": copied}
    series = {name: {"train": run.train, "evaluation": run.evaluation} for name, run in runs.items()}
    return series | {"sharded": seen}


def train_sharded_and_save(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The script's own run under Accelerate's FSDP2 with learned temperatures, whole and gone on; saves the model."""
    changes = {"hard": True, "learn_tau": "head", "learning_rate": 1e-2, "save_model": True}
    with sharding_on_cpu("SHARDED_STATE_DICT"):
        whole = start(settings, **changes, output_dir=str(folder / "whole"), checkpointing_steps=1, keep_last=None)
        checkpoint = str(folder / "whole" / "checkpoint-2")
        again = start(settings, **changes, output_dir=str(folder / "again"), resume_from_checkpoint=checkpoint)
    return {
        name: {"train": run.train, "evaluation": run.evaluation} for name, run in (("whole", whole), ("again", again))
    }
