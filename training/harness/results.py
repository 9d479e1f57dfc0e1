"""What a run leaves behind: results.json, written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"
CONFIG_FILE = "config.yaml"
_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "gumbel_attention")


def write_atomically(path: Path, text: str) -> None:
    """Writes a file by way of a temporary name, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes the resolved configuration, readable again with ``--config``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False))


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json; its existence with status "finished" is what makes a run finished."""
    content = {"schema_version": SCHEMA_VERSION, "status": "finished", **results}
    write_atomically(folder / RESULTS_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_results(folder: Path) -> dict[str, Any] | None:
    """The results of a finished run; None if the folder holds none."""
    try:
        results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    finished = isinstance(results, dict) and results.get("status") == "finished"
    return results if finished else None


def environment(device: torch.device, num_processes: int) -> dict[str, Any]:
    """Device, processes, package versions and git state that the numbers of a run depend on."""
    return {
        "device": device_name(device),
        "num_processes": num_processes,
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "git": git_state(Path(__file__).parent),
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the kind of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory the process held: on the GPU as torch allocated it, on the CPU its resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that ``folder`` is in and whether files differ from it; None outside git."""
    try:
        commit = _git(folder, "rev-parse", "--verify", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def _git(folder: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True, text=True).stdout


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
