"""Checks of command-line flags that several scripts have, and how a script ends when one fails."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping

from harness.errors import UsageError


def end_if_refused(
    parser: argparse.ArgumentParser, check: Callable[[argparse.Namespace], None], args: argparse.Namespace
) -> None:
    """Ends the script with the parser's usage and what ``check`` says against the flags, if it raises ValueError."""
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))


def check_at_least(args: argparse.Namespace, lowest: Mapping[str, int]) -> None:
    """Refuses numbers below their lowest value.

    Args:
        args: the parsed flags.
        lowest: for each flag, the lowest value that makes sense.

    Raises:
        UsageError: says which flag, and what it may be.
    """
    for name, least in lowest.items():
        if getattr(args, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(args, name)}.")


def check_grid(args: argparse.Namespace, name: str = "learning_rates") -> None:
    """Refuses a grid of values that are not positive, finite and different.

    Raises:
        UsageError: says which flag, and what it may be.
    """
    values = getattr(args, name)
    if len(set(values)) < len(values) or not all(0 < value < math.inf for value in values):
        raise UsageError(f"--{name} must be finite, > 0 and differ from each other, got {values}.")
