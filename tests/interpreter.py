"""Triton's interpreter, which is chosen by an environment variable before triton is imported, for good.

A test file that needs it has one test which starts the file's others in a process of their own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETER_WARNINGS = [  # numpy's
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    # rows past the last key hold anything; they are not stored
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


def run_interpreted(*arguments: str) -> str:
    """What pytest prints in a process with the interpreter, which must succeed; skips where it cannot run."""
    reason = _no_interpreter()
    if reason is not None:  # triton is no dependency of the tests: `make test-triton` installs it with its numpy
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def _no_interpreter() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        return "the interpreter of triton < 3.7 needs numpy < 2.4"
    return None


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", importlib.metadata.version(package))[:2])
