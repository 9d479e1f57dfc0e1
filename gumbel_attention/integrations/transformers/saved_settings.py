"""What is saved of a patched model beside its weights: how it is written, and how it is read again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...config import GumbelAttentionConfig, check_positive
from ...version import __version__
from ..patched_state import PatchedState, state_of

KEY = "gumbel_attention"
"""The entry of a saved ``config.json``."""
FORMAT_VERSION = 1
RESTORE = "gumbel_attention.from_pretrained"
_ENTRY = ("format_version", "library_version", "restore", "groups")
_LEARNED = "log_tau"
_GROUP = ("config", "tau", "noise_scale", "layers", _LEARNED)


def settings_of(model: nn.Module) -> dict[str, Any]:
    """The settings in force in a model, as plain values that JSON can hold.

    Returns:
        The versions of the format and of the library, what restores them, and ``groups`` of layers that share their
        settings, temperature and noise scale: the names of their modules in ``model``, the settings, the current
        ``noise_scale``, and ``tau``, which is ``None`` where it is learned and lies among the weights. Groups that
        learn theirs have ``log_tau`` too, by layer, which tells later whether weights belong to these settings.
    """
    groups: dict[tuple[GumbelAttentionConfig, float | None, float], dict[str, PatchedState]] = {}
    for name, module in model.named_modules():
        state = state_of(module)
        if state is not None:
            groups.setdefault((state.config, _scheduled_tau(state), _noise_scale(state)), {})[name] = state
    return {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "restore": RESTORE,
        "groups": [
            {"config": config.to_dict(), "tau": tau, "noise_scale": noise_scale, "layers": list(layers)}
            | _learned(layers)
            for (config, tau, noise_scale), layers in groups.items()
        ],
    }


def config_entry(model: nn.Module) -> dict[str, Any]:
    """What the ``config.json`` of a patched model says beyond the model's own settings."""
    return {KEY: settings_of(model)}


def is_entry(value: object) -> bool:
    """Whether a value under our key is one that this library wrote, in whatever version."""
    return isinstance(value, Mapping) and "format_version" in value


def without_learned(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry without the learned temperatures, for readers that have the weights it was saved with."""
    groups = entry.get("groups")
    if not isinstance(groups, list):
        return dict(entry)
    return {
        **entry,
        "groups": [
            {key: value for key, value in group.items() if key != _LEARNED} if isinstance(group, Mapping) else group
            for group in groups
        ],
    }


def _learned(layers: Mapping[str, PatchedState]) -> dict[str, Any]:
    """The learned temperatures that this process has whole; sharded ones would need all processes."""
    learned = {}
    for name, state in layers.items():
        log_tau, size = state.log_tau, state.num_heads if state.config.learn_tau == "head" else 1
        whole = log_tau is not None and not log_tau.is_meta and not hasattr(log_tau, "full_tensor")
        if log_tau is not None and whole and log_tau.numel() == size:
            learned[name] = log_tau.tolist()
    return {_LEARNED: learned} if learned else {}


def _scheduled_tau(state: PatchedState) -> float | None:
    if state.log_tau is not None:
        return None
    return state.config.tau if state.tau.is_meta else state.tau.item()


def _noise_scale(state: PatchedState) -> float:
    return state.config.noise_scale if state.noise_scale.is_meta else state.noise_scale.item()


@dataclasses.dataclass(frozen=True)
class SavedLayer:
    """One layer as it was saved: its module's name and settings, its temperature unless learned, its noise scale.

    ``log_tau`` is the learned temperature that its weights must hold, ``None`` where any is right.
    """

    name: str
    config: GumbelAttentionConfig
    tau: float | None
    noise_scale: float
    log_tau: tuple[float, ...] | None = None


def read_settings(entry: Mapping[str, Any], where: str) -> list[SavedLayer]:
    """The inverse of :func:`settings_of`.

    Args:
        entry: what was saved.
        where: what the error messages name as its place.

    Raises:
        ValueError: written in a newer format, or keys that this version does not know; or not what was written.
    """
    version, writer = entry.get("format_version"), entry.get("library_version", "unknown")
    try:
        unknown = sorted(_unknown_keys(entry))
        readable = version == FORMAT_VERSION and not unknown
        layers = [layer for group in entry["groups"] for layer in _read_group(group)] if readable else []
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} holds Gumbel attention settings, written by gumbel_attention {writer}, that gumbel_attention "
            f"{__version__} cannot use: {error!r}"
        ) from error
    if not readable:
        raise ValueError(
            f"{where} holds Gumbel attention settings of format {version!r}, written by gumbel_attention {writer}; "
            f"gumbel_attention {__version__} reads format {FORMAT_VERSION}. Keys it does not know: "
            f"{unknown or 'none'}. Use the library version that wrote them, or a newer one."
        )
    if not layers:
        raise ValueError(f"{where} holds Gumbel attention settings that name no layer.")
    return layers


def _unknown_keys(entry: Mapping[str, Any]) -> set[str]:
    known = GumbelAttentionConfig().to_dict()
    unknown = set(entry) - set(_ENTRY)
    for group in entry.get("groups", []):
        unknown |= set(group) - set(_GROUP)
        unknown |= set(group.get("config", {})) - set(known)
    return unknown


def _read_group(group: Mapping[str, Any]) -> list[SavedLayer]:
    config = GumbelAttentionConfig.from_dict(group["config"])
    tau, noise_scale = group["tau"], group["noise_scale"]
    check_positive("noise_scale", noise_scale, zero_allowed=True)
    if config.learn_tau is None:
        check_positive("tau", tau)
    learned = {name: tuple(map(float, values)) for name, values in group.get(_LEARNED, {}).items()}
    return [SavedLayer(name, config, tau, noise_scale, learned.get(name)) for name in group["layers"]]


def match_names(saved: Sequence[str], present: Sequence[str], where: str) -> dict[str, str]:
    """Which of the present names each saved one means: itself, or the one that differs by a prefix.

    A prefix is what a model with a head and its base model differ by.

    Raises:
        ValueError: a saved name means none or several of those present, or two mean the same.
    """
    matches: dict[str, str] = {}
    for name in saved:
        found = [name] if name in present else [other for other in present if _differ_by_prefix(name, other)]
        if len(found) != 1 or found[0] in matches.values():
            raise ValueError(
                f"{where} names {name!r}, which matches {found or 'nothing'} here (and one each is needed); there are "
                f"{list(present)}. Load it with the model class that was saved."
            )
        matches[name] = found[0]
    return matches


def _differ_by_prefix(one: str, other: str) -> bool:
    return one.endswith(f".{other}") or other.endswith(f".{one}")
