"""Checks of the parts of a study's file that are settings, seeds and names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.arguments import RunArguments
from harness.attention import attention_config
from harness.errors import UsageError
from harness.parsing import check_keys

OWN_KEYS = ("seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run")
"""Settings of a run that the study itself sets."""


def run_settings(kind: type[RunArguments], settings: dict[str, Any], where: str) -> RunArguments:
    """The checked settings of a run; ``{seed}`` in a text among them, such as a path, is the run's seed.

    Raises:
        UsageError: a value or a combination that a run would refuse; the message names ``where``.
    """
    seed = str(settings["seed"])
    filled = {
        key: value.replace("{seed}", seed) if isinstance(value, str) else value for key, value in settings.items()
    }
    try:
        args = kind(**filled)
        attention_config(args)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    return args


def read_grid(
    value: Any,
    kind: type[RunArguments],
    arms: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    where: str,
) -> dict[str, tuple[float, ...]]:
    """Setting -> its values in the search, ascending.

    Raises:
        UsageError: fewer than two values, one twice or a text, or a setting that arms or the search set already.
    """
    content = mapping(value, f"grid in {where}")
    if not content:
        raise UsageError(f"grid in {where}: expected values such as {{learning_rate: [5.0e-5, 1.0e-4]}}.")
    grid = {}
    for key, values in content.items():
        if not isinstance(values, list) or len(values) < 2:
            raise UsageError(f"{key} of the grid in {where}: expected a list of two values or more, got {values!r}.")
        checked = [own_settings(kind, {key: one}, f"grid of {where}")[key] for one in values]
        if not all(isinstance(one, (int, float)) for one in checked):
            raise UsageError(f"{key} of the grid in {where}: expected numbers, or false and true, got {values!r}.")
        if len(set(checked)) != len(checked):
            raise UsageError(f"{key} of the grid in {where}: {values!r} holds a value twice.")
        grid[key] = tuple(sorted(checked))
        for arm, differences in arms.items():
            if key in differences:
                raise UsageError(f"arm {arm!r} sets {key}, which the {where} chooses: remove it from one of them.")
        if key in settings:
            raise UsageError(f"settings of the {where} set {key}, which its grid varies: remove it there.")
    return grid


def mapping(value: Any, where: str) -> dict[str, Any]:
    """A mapping; None is an empty one.

    Raises:
        UsageError: it is none.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected a mapping, got {value!r}.")
    return value


def own_settings(kind: type[RunArguments], value: Any, where: str) -> dict[str, Any]:
    """Checked settings of a run, without those that the study itself sets.

    Raises:
        UsageError: an unknown key, a wrong type, or one of :data:`OWN_KEYS`.
    """
    settings = check_keys(kind, mapping(value, where), f"in {where}")
    for key in OWN_KEYS:
        if key in settings:
            raise UsageError(f"{where}: {key} is set by the study (its seeds and output_dir); remove it here.")
    return settings


def read_seeds(value: Any, where: str) -> tuple[int, ...]:
    """Checked seeds.

    Raises:
        UsageError: no list of integers, or one twice.
    """
    if not isinstance(value, list) or not value or not all(type(seed) is int for seed in value):
        raise UsageError(f"{where}: expected a list of integers such as [0, 1, 2], got {value!r}.")
    if len(set(value)) != len(value):
        raise UsageError(f"{where}: {value} holds a seed twice.")
    return tuple(value)


def check_arm_name(arm: Any, where: str) -> None:
    """Raises UsageError for a name that is no part of a file name."""
    if not isinstance(arm, str) or not arm.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UsageError(f"{where}: the name of an arm may hold letters, digits, '-', '_' and '.' only.")
