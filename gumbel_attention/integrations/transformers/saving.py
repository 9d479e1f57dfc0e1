"""Patched models that last: the handle of one that was copied, wrapped or read, and its way to a file and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoints import SETTINGS_FILE, SUFFIX, TENSORS_FILE, Checkpoint
from .notice import settings_expected
from .patch import ModelPatch, patched_modules
from .patching import restore_patch
from .saved_settings import settings_of


def patch_of(model: nn.Module) -> ModelPatch:
    """The handle of a model that is patched: a deep copy, an unpickled one, or one that something else has wrapped.

    Args:
        model: the model, or what DistributedDataParallel, PEFT or ``torch.compile`` made of it.

    Returns:
        One handle for all patched layers, whose names are those in the transformers model. Its ``remove()`` takes all
        of them out.

    Raises:
        ValueError: the model is not patched.
    """
    root = unwrapped(model)
    patched = patched_modules(root)
    if not patched:
        raise ValueError(
            f"{type(model).__name__} is not patched: call gumbel_attention.patch_model(model, config), or load it "
            "with gumbel_attention.from_pretrained."
        )
    return ModelPatch(root, patched)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model in a wrapper; ``model`` itself where there is none or it holds not all patched layers."""
    root = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    return root if len(patched_modules(root)) == len(patched_modules(model)) else model


def save_patch(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Writes the settings, temperatures and learned temperatures of a patched model, and no other weights.

    For models whose own ``save_pretrained`` leaves out the config, as PEFT's adapters do; :func:`load_patch` is the
    inverse. PEFT freezes what is no adapter: for learned temperatures to go on learning, set ``requires_grad`` of
    ``patch_of(model).learned_tau_parameters()`` after ``get_peft_model``.

    All processes of a model that is sharded (FSDP2) call this together, where temperatures are learned; the first
    writes.

    Args:
        model: a patched model, wrapped or not.
        folder: made if it does not exist; gets ``gumbel_attention.json`` and, where temperatures are learned,
            ``gumbel_attention.safetensors``.

    Raises:
        ValueError: the model is not patched, or this process has a part of its learned temperatures (FSDP 1, ZeRO-3).
    """
    content = gathered_patch(model)
    if not content.sharded or torch.distributed.get_rank() == 0:
        content.write(folder)


class PatchContent(NamedTuple):
    """What :func:`save_patch` writes: the settings, the learned temperatures, and whether these were sharded.

    ``partial`` names the layers of whose temperatures this process has a part and cannot gather the rest.
    """

    settings: dict[str, Any]
    learned: dict[str, Tensor]
    sharded: bool
    partial: list[str]

    def write(self, folder: str | PathLike[str]) -> None:
        """Writes it into a folder, which is made if it does not exist.

        Raises:
            ValueError: a temperature is not whole.
        """
        if self.partial:
            raise ValueError(
                f"this process has a part of the learned temperatures of the layers {self.partial}, as under FSDP 1 "
                "and ZeRO-3: save the gathered weights, or call it where they are gathered "
                "(deepspeed.zero.GatheredParameters, FSDP.summon_full_params)."
            )
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.settings, indent=2) + "\n"
        (target / SETTINGS_FILE).write_text(text, encoding="utf-8")
        if self.learned:
            save_file(self.learned, target / TENSORS_FILE, metadata={"format": "pt"})
        else:
            (target / TENSORS_FILE).unlink(missing_ok=True)


def gathered_patch(model: nn.Module) -> PatchContent:
    """The patch of a model, wrapped or not; all processes of a model that is sharded call this together.

    Raises:
        ValueError: the model is not patched.
    """
    patch_of(model)
    root = unwrapped(model)
    learning = {layer.name: state for layer, _, state in patched_modules(root) if state.log_tau is not None}
    learned = {name: _whole(state.log_tau).cpu().contiguous() for name, state in learning.items()}
    sharded = any(hasattr(state.log_tau, "full_tensor") for state in learning.values())
    sizes = {name: state.num_heads if state.config.learn_tau == "head" else 1 for name, state in learning.items()}
    partial = [name for name, log_tau in learned.items() if log_tau.numel() != sizes[name]]
    named = {f"{name}{SUFFIX}": log_tau for name, log_tau in learned.items()}
    return PatchContent(settings_of(root), named, sharded, partial)


def _whole(parameter: nn.Parameter | None) -> Tensor:
    """The values of a parameter; all processes call this together for one that is sharded (a DTensor)."""
    assert parameter is not None
    values: Any = parameter.detach()
    whole: Tensor = values.full_tensor() if hasattr(values, "full_tensor") else values
    return whole


def load_patch(model: nn.Module, path: str | PathLike[str], **kwargs: Any) -> ModelPatch:
    """Patches a model as the one was that was saved at ``path``, and reads no weights but learned temperatures.

    Args:
        model: a transformers model, wrapped or not.
        path: a folder, or a repository on the hub, that :func:`save_patch` or a patched model's ``save_pretrained``
            wrote.
        **kwargs: ``revision``, ``subfolder``, ``token`` and the like, as for ``from_pretrained``.

    Returns:
        The patch.

    Raises:
        OSError: there is no such place.
        ValueError: as :func:`from_pretrained`, or the model is patched already.
    """
    checkpoint, root = Checkpoint(path, **kwargs), unwrapped(model)
    if not isinstance(root, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel or wrap one, got {type(model).__name__}.")
    return restore_patch(root, checkpoint.layers(), checkpoint)


def from_pretrained(model_class: Any, path: str | PathLike[str], **kwargs: Any) -> Any:
    """Loads a patched model with its weights and its attention.

    Args:
        model_class: what loads the weights: a model class of transformers, such as ``AutoModel``, or of PEFT.
        path: a folder that a patched model was saved in, or a repository that it was pushed to. A model with another
            head, or without one, may be loaded from it: the layers are told by their names, prefixes apart.
        **kwargs: for ``model_class.from_pretrained``.

    Returns:
        What ``model_class.from_pretrained`` returns; :func:`patch_of` gives the handle of the patch.

    Raises:
        ValueError: the folder carries no settings, or ones that this version cannot read (it names the keys it does
            not know), or that do not fit the model, or no learned temperature where there should be one.
    """
    checkpoint = Checkpoint(path, **kwargs)
    layers = checkpoint.layers()
    with settings_expected(), _learned_tau_expected():
        loaded = model_class.from_pretrained(path, **kwargs)
    root: Any = unwrapped(loaded[0] if isinstance(loaded, tuple) else loaded)
    restore_patch(root, layers, checkpoint)
    return loaded


@contextmanager
def _learned_tau_expected() -> Iterator[None]:
    """Keeps learned temperatures, which are read apart, out of transformers' report of unexpected weights."""
    name = "_keys_to_ignore_on_load_unexpected"
    before = getattr(PreTrainedModel, name)
    setattr(PreTrainedModel, name, [*(before or ()), f"{re.escape(SUFFIX)}$"])
    try:
        yield
    finally:
        setattr(PreTrainedModel, name, before)
