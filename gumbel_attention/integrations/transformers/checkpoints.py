"""Folders and hub repositories that a patched model was saved in: its settings and its learned temperatures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file

from .saved_settings import KEY, SavedLayer, is_entry, match_names, read_settings, without_learned

SETTINGS_FILE = "gumbel_attention.json"
TENSORS_FILE = "gumbel_attention.safetensors"
SUFFIX = ".gumbel.log_tau"
"""What the name of a learned temperature adds to that of its attention module."""
_HUB = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")


class Checkpoint:
    """A place that a patched model was saved in.

    Args:
        path: a folder, or the name of a repository on the hub.
        **options: as ``from_pretrained`` takes them; those that say where and which files are used.
    """

    def __init__(self, path: str | PathLike[str], **options: Any) -> None:
        self.path = fspath(path)
        self._hub = {name: options[name] for name in _HUB if options.get(name) is not None}
        self._variant = options.get("variant")

    def layers(self) -> list[SavedLayer]:
        """The patched layers, as ``config.json`` or ``gumbel_attention.json`` tells of them but for learned values.

        Raises:
            OSError: there is no such place.
            ValueError: it tells nothing, two different things, or what this version cannot read.
        """
        candidates: tuple[Any, ...] = ((self._json(CONFIG_NAME) or {}).get(KEY), self._json(SETTINGS_FILE))
        entries: list[Any] = [without_learned(entry) for entry in candidates if is_entry(entry)]
        if not entries and not Path(self.path).is_dir() and self._file(CONFIG_NAME) is None:
            raise OSError(f"{self.path!r} is neither a folder nor a repository with a {CONFIG_NAME} that can be read.")
        if not entries:
            raise ValueError(
                f"{self.path!r} carries no Gumbel attention settings. Load the model with transformers alone and call "
                "gumbel_attention.patch_model(model, config)."
            )
        if entries[0] != entries[-1]:
            raise ValueError(
                f"{CONFIG_NAME} and {SETTINGS_FILE} in {self.path!r} say different things of Gumbel attention; delete "
                f"the one that is out of date (in {CONFIG_NAME} the entry {KEY!r})."
            )
        return read_settings(entries[0], repr(self.path))

    def learned_tau(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """The learned temperatures (their logarithms) of the layers of these names.

        Raises:
            ValueError: no file of weights holds one for each, or two files hold different ones.
        """
        of_patch, of_weights = self._patch_tau(), self._weights_tau()
        if not of_patch and not of_weights:
            raise ValueError(
                f"no learned temperature for the layers {list(layers)} in the weights at {self.path!r}: no key there "
                f"ends in {SUFFIX!r}. Load from the folder that the patched model was saved in, with "
                "gumbel_attention.from_pretrained(model_class, folder), and say its subfolder, revision or variant."
            )
        found = self._of_layers(layers, of_patch or of_weights)
        if of_patch:
            self._refuse_others(found, of_weights)
        return found

    def _of_layers(self, layers: Sequence[str], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [name if name in saved else _reordered(name, saved) for name in layers]
        matches = match_names(names, list(saved), f"the settings at {self.path!r}")
        return {layer: saved[matches[name]] for layer, name in zip(layers, names, strict=True)}

    def _refuse_others(self, found: Mapping[str, Tensor], of_weights: Mapping[str, Tensor]) -> None:
        """Raises where the weights hold another temperature of a layer than the patch's own file."""
        for layer, log_tau in found.items():
            try:
                other = self._of_layers([layer], of_weights)[layer]
            except ValueError:  # weights that Accelerate wrote of a wrapped model may go by other names
                continue
            if not same_values(log_tau, other):
                raise ValueError(
                    f"{TENSORS_FILE} and the weights at {self.path!r} hold different learned temperatures of the "
                    f"layer {layer!r}: delete {TENSORS_FILE} if it is out of date. If the weights are, move "
                    f"{SETTINGS_FILE} and {TENSORS_FILE} to a folder of their own and call "
                    "gumbel_attention.load_patch(model, folder) on a model that transformers alone has loaded."
                )

    def _patch_tau(self) -> dict[str, Tensor]:
        path = self._file(TENSORS_FILE)
        return {} if path is None else _read_tau([path])

    def _weights_tau(self) -> dict[str, Tensor]:
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
            path = self._file(name if self._variant is None else self._with_variant(name))
            if path is None:
                continue
            return _read_tau([path] if not name.endswith(".json") else self._shards(path))
        return {}

    def _with_variant(self, name: str) -> str:
        stem, _, ending = name.rpartition(".")
        return f"{stem}.{self._variant}.{ending}"

    def _shards(self, index: str) -> list[str]:
        """The files that an index names for the learned temperatures."""
        weight_map: Mapping[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted({file for key, file in weight_map.items() if key.endswith(SUFFIX)})
        return [file for file in map(self._file, names) if file is not None]

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self._file(name)
        if path is None:
            return None
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return content

    def _file(self, name: str) -> str | None:
        """Where the file lies on this machine, ``None`` if there is no such file."""
        try:
            return cached_file(self.path, name, **self._hub)
        except OSError:
            return None


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two learned temperatures are the same, but for the rounding of a file of lower precision."""
    if one.shape != other.shape:
        return False
    rounded = (one.to(other.dtype), other), (other.to(one.dtype), one)
    return any(torch.allclose(*pair, rtol=0.0, atol=0.0, equal_nan=True) for pair in rounded)


def _reordered(name: str, saved: Iterable[str]) -> str:
    """The one saved name with the same parts and its numbers in the same order, as renamed weights have it."""
    found = [other for other in saved if _parts(other) == _parts(name)]
    return found[0] if len(found) == 1 else name


def _parts(name: str) -> tuple[list[str], list[str]]:
    parts = name.split(".")
    return sorted(parts), [part for part in parts if part.isdigit()]


def _read_tau(files: Iterable[str]) -> dict[str, Tensor]:
    """The learned temperatures in these files, by the names of the attention modules."""
    return {key.removesuffix(SUFFIX): log_tau for file in files for key, log_tau in _read(file).items()}


def _read(file: str) -> dict[str, Tensor]:
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys() if key.endswith(SUFFIX)}  # noqa: SIM118
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return {key: tensor for key, tensor in weights.items() if key.endswith(SUFFIX)}
