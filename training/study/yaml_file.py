"""YAML whose mappings hold every key once, and settings as it writes them."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from harness.errors import UsageError
from harness.parsing import expand_variables


class _StrictLoader(yaml.SafeLoader):
    """YAML says that keys are unique; the parser keeps the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key in seen:
                raise UsageError(f"the key {key!r} is there twice, in lines {seen[key]} and {line}: remove one.")
            if isinstance(key, Hashable):
                seen[key] = line
        return super().construct_mapping(node, deep)


def read_strict_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, ``${VARIABLE}`` in its strings replaced from the environment.

    Raises:
        UsageError: no such file, not YAML, not a mapping, a key that is there twice, or an unset variable.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise UsageError(f"cannot read the configuration file {str(path)!r}: {error.strerror}.") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{str(path)!r} must hold a mapping 'key: value', got a {type(content).__name__}.")
    return {key: expand_variables(value, f"{key} in {path}") for key, value in content.items()}


def yaml_text(value: object) -> str:
    """A setting as YAML writes it, more or less."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
