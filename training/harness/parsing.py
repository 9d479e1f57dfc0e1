"""Dataclass fields as script settings: defaults, then a YAML file, then the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import operator
import os
import re
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from harness.errors import UsageError

Settings = TypeVar("Settings")

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def parse_arguments(cls: type[Settings], argv: Sequence[str] | None = None, description: str = "") -> Settings:
    """Reads an instance of the dataclass ``cls`` from ``--config FILE`` and ``--key value`` arguments.

    A value on the command line wins over the file, the file over the default of the field.

    Args:
        cls: dataclass; each field is a setting, ``metadata["help"]`` its help text.
        argv: arguments without the program name; None reads ``sys.argv``.
        description: what ``--help`` says about the script.

    Raises:
        UsageError: unknown keys, wrong types, an unreadable file or an unset ``${VARIABLE}``.
    """
    hints = get_type_hints(cls)
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the settings below")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint, text = hints[field.name], _help_of(field).replace("%", "%%")
        option = parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, metavar=type_name(hint), help=text)
        if _base_type(hint) is bool:
            option.nargs, option.const = "?", "true"
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    config = given.pop("config")
    if unknown:
        refuse_unknown([unknown[0].split("=")[0].lstrip("-")], hints, "on the command line", prefix="--")
    values: dict[str, Any] = {}
    if config is not None:
        values = check_keys(cls, read_yaml(config, overridden=given), f"in {config}")
    values |= {key: convert(_from_text(text, hints[key]), hints[key], f"--{key}") for key, text in given.items()}
    return _build(cls, values)


def from_mapping(cls: type[Settings], mapping: Mapping[str, Any], where: str) -> Settings:
    """An instance of the dataclass ``cls`` from a mapping whose keys and types are checked.

    Args:
        cls: the dataclass.
        mapping: values by field name, as YAML reads them.
        where: the place the mapping came from, for messages.

    Raises:
        UsageError: an unknown key, a wrong type, or a value the dataclass refuses.
    """
    return _build(cls, check_keys(cls, mapping, where))


def check_keys(cls: type, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``mapping`` with each value converted to the type of its field.

    Raises:
        UsageError: an unknown key or a wrong type.
    """
    hints = get_type_hints(cls)
    refuse_unknown(mapping, hints, where)
    return {key: convert(value, hints[key], f"{key} {where}") for key, value in mapping.items()}


def refuse_unknown(keys: Iterable[Any], known: Iterable[str], where: str, prefix: str = "") -> None:
    """Raises UsageError if one of ``keys`` is not ``known``, with the nearest name and the whole list."""
    names = sorted(known)
    for key in keys:
        if key in names:
            continue
        near = difflib.get_close_matches(str(key), names, n=1)
        hint = f" Did you mean {prefix}{near[0]}?" if near else ""
        raise UsageError(f"unknown setting {prefix}{key} {where}.{hint} Known settings: {', '.join(names)}.")


def read_yaml(path: str | os.PathLike[str], overridden: Collection[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, ``${VARIABLE}`` in its strings replaced from the environment.

    Args:
        path: the file.
        overridden: keys whose values do not count: their variables need not be set, and stay as they are written.

    Raises:
        UsageError: no such file, not YAML, not a mapping, or an unset variable.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration file {str(path)!r}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{str(path)!r} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{str(path)!r} must hold a mapping 'key: value', got a {type(content).__name__}.")
    return {
        key: value if key in overridden else expand_variables(value, f"{key} in {path}")
        for key, value in content.items()
    }


def expand_variables(value: Any, where: str) -> Any:
    """``value`` with ``${VARIABLE}`` replaced in every string, also inside lists and mappings.

    Raises:
        UsageError: the variable is not set.
    """
    if isinstance(value, dict):
        return {key: expand_variables(item, f"{key} of {where}") for key, item in value.items()}
    if isinstance(value, list):
        return [expand_variables(item, where) for item in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise UsageError(
                f"{where} uses the environment variable {name}, which is not set. "
                f"Set it (export {name}=...) or write the value itself."
            )
        return os.environ[name]

    return _VARIABLE.sub(lookup, value)


def convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the type ``hint``; YAML reads 1e-5 as a string and 1 as an int, both are good floats.

    Raises:
        UsageError: ``value`` is not of that type; the message names ``where``.
    """
    if value is None and type(None) in get_args(hint):
        return None
    base = _base_type(hint)
    if get_origin(base) is tuple:
        return _convert_tuple(value, hint, where)
    if get_origin(base) is Literal:
        if value in get_args(base) and not isinstance(value, bool):
            return value
    elif get_origin(base) in (Union, types.UnionType):
        if isinstance(value, get_args(base)) and not isinstance(value, bool):
            return value
    elif base is float:
        number = _as_float(value)
        if number is not None:
            return number
    elif isinstance(value, base) and not (base is int and isinstance(value, bool)):
        return value
    hint_off = " YAML reads unquoted yes, no, on, off as bool: quote the word." if isinstance(value, bool) else ""
    raise UsageError(f"{where}: expected {type_name(hint)}, got {value!r} of type {type(value).__name__}.{hint_off}")


def type_name(hint: Any) -> str:
    """A readable name of a field type, such as ``int or null``."""
    base = _base_type(hint)
    if get_origin(base) is tuple:
        name = f"list of {type_name(get_args(base)[0])}"
    elif get_origin(base) is Literal:
        name = "one of " + "|".join(str(choice) for choice in get_args(base))
    elif get_origin(base) in (Union, types.UnionType):
        name = " or ".join(kind.__name__ for kind in get_args(base))
    else:
        name = base.__name__
    return f"{name} or null" if type(None) in get_args(hint) else name


def _help_of(field: dataclasses.Field[Any]) -> str:
    """What the help says of a setting: its text, and its default where it has one."""
    text = str(field.metadata.get("help", ""))
    if field.default is dataclasses.MISSING:
        return text
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    default = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    return f"{text} (default: {default})"


def _build(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    required = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise UsageError(f"missing required settings: {', '.join(missing)}. Give them in the YAML file or as --key.")
    return cls(**values)


def _base_type(hint: Any) -> Any:
    """The type without its ``| None``."""
    if get_origin(hint) not in (Union, types.UnionType) or type(None) not in get_args(hint):
        return hint
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else functools.reduce(operator.or_, kinds)


def _from_text(text: str, hint: Any) -> Any:
    """A command-line word as YAML would have read it for a field of this type."""
    if type(None) in get_args(hint) and text.lower() in ("null", "none"):
        return None
    base = _base_type(hint)
    if base is str or get_origin(base) is Literal:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _convert_tuple(value: Any, hint: Any, where: str) -> tuple[Any, ...]:
    """A list, a single element, or the comma-separated words of a string, each converted."""
    element = get_args(_base_type(hint))[0]
    if isinstance(value, str):
        items = [yaml.safe_load(word) for word in value.split(",")]
    elif isinstance(value, (list, tuple)):
        items = list(value)
    else:
        items = [value]
    return tuple(convert(item, element, where) for item in items)
