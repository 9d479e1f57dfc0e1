"""Calls a function in a fresh Python process: for what a process can measure once only, or may not survive."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import Any


class ProcessError(RuntimeError):
    """The process died, raised an error, or took too long."""


def call(target: str, *arguments: Any, timeout: float | None = None) -> Any:
    """The result of ``module:function`` for these arguments.

    Args:
        target: the function, importable from this process's path.
        *arguments: what JSON can hold; so must be the result.
        timeout: seconds after which the process is ended.

    Raises:
        ProcessError: there is no result; the message ends with the process's last words.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, target], input=json.dumps(arguments), env=environment, timeout=timeout,
            capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ProcessError(f"no result after {timeout:g} s") from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        words = done.stderr.strip().splitlines() or [""]
        raise ProcessError(f"the process ended with status {done.returncode}: {words[-1]}")
    return json.loads(lines[-1])


if __name__ == "__main__":
    module, function = sys.argv[1].split(":")
    print("\n" + json.dumps(getattr(importlib.import_module(module), function)(*json.load(sys.stdin))))
