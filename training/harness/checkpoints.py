"""Checkpoint folders: there whole or not at all, and checked when read.

A checkpoint is a folder ``checkpoint-<step>``. While it is written it is called ``checkpoint-<step>.unfinished``; it
gets its name when all of it lies on the disk. ``SHA256SUMS`` in it lists every other file, as ``sha256sum -c`` reads
it. Older checkpoints go only after that.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from harness.errors import UsageError

CHECKSUMS_FILE = "SHA256SUMS"
UNFINISHED = ".unfinished"
_LEFTOVER = (UNFINISHED, ".replaced", ".removed")
_LITTLE = 2**20  # bytes
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimiser step goes."""
    return folder / f"checkpoint-{step}"


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, damaged ones included, the latest first."""
    steps = [(int(match[1]), path) for path in _entries(folder) if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(steps, reverse=True)]


def write_checkpoint(
    folder: Path, step: int, write: Callable[[Path], None], keep_last: int | None, accelerator: Accelerator
) -> Path:
    """Writes a checkpoint, then removes old ones; all processes call this together.

    Args:
        folder: of the run; on several machines one that they share.
        step: the optimiser step.
        write: puts the files into the folder it is given; called in every process.
        keep_last: how many checkpoints stay, this one included; None keeps all.
        accelerator: of the run.

    Raises:
        CheckpointError: it could not be written.
    """
    path = checkpoint_path(folder, step)
    unfinished = path.with_name(path.name + UNFINISHED)
    main = accelerator.is_main_process
    try:
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        write(unfinished)
        accelerator.wait_for_everyone()
        if main:
            seal(unfinished)
            _publish(unfinished, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        words = _failure(folder, step, error)
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(words) from error
    if main and keep_last is not None:
        _prune(folder, step, keep_last)
    accelerator.wait_for_everyone()
    return path


def seal(path: Path) -> None:
    """Writes the checksums of all files in a folder and waits until everything is on the disk."""
    lines = [f"{_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in _files(path)]
    (path / CHECKSUMS_FILE).write_text("".join(lines), encoding="utf-8")
    for file in path.rglob("*"):
        _flush(file)
    _flush(path)


def damage(path: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file; empty for a sound one."""
    try:
        lines = (path / CHECKSUMS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [f"{CHECKSUMS_FILE} is missing or unreadable"]
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {file.relative_to(path).as_posix(): file for file in _files(path)}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is not in {CHECKSUMS_FILE}" for name in sorted(found.keys() - expected.keys())]
    shared = sorted(expected.keys() & found.keys())
    problems += [f"{name} is not what was written" for name in shared if _sha256(found[name]) != expected[name]]
    return problems if expected else [f"{CHECKSUMS_FILE} is empty"]


def check(path: Path) -> None:
    """Raises UsageError if ``path`` is no sound checkpoint."""
    if not path.is_dir():
        raise UsageError(f"resume_from_checkpoint {str(path)!r}: no such folder; give a checkpoint, or 'latest'.")
    problems = damage(path)
    if problems:
        raise UsageError(
            f"the checkpoint {str(path)!r} is damaged or unfinished: {'; '.join(problems)}. "
            "Choose another, or 'latest', which passes over it."
        )


def latest(folder: Path, tell: Callable[[str], object]) -> Path | None:
    """The latest sound checkpoint in a run's folder; None if there is none.

    Args:
        folder: of the run.
        tell: is told of every checkpoint that is passed over, and why.
    """
    for path in _entries(folder):
        if _NAME.match(path.name) and path.name.endswith(UNFINISHED):
            tell(f"passes over {path.name}: it was never finished")
    for path in find_checkpoints(folder):
        problems = damage(path)
        if not problems:
            return path
        tell(f"passes over {path.name}, which is damaged: {'; '.join(problems)}")
    return None


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left half written or half removed."""
    for path in _entries(folder):
        if _NAME.match(path.name) and path.name.endswith(_LEFTOVER):
            shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(folder: Path) -> None:
    """Removes all checkpoints of a run."""
    for path in find_checkpoints(folder):
        _remove(path)
    remove_leftovers(folder)


def _publish(unfinished: Path, path: Path) -> None:
    """Renames a sealed folder; one of that name, from a run resumed before this step, makes way."""
    replaced = path.with_name(path.name + ".replaced")
    if path.exists():
        path.rename(replaced)
    unfinished.rename(path)
    _flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _prune(folder: Path, step: int, keep_last: int) -> None:
    """Removes all but the last ones up to ``step``; later ones are of another try, which 'latest' may have refused."""
    reached = [path for path in find_checkpoints(folder) if int(path.name.partition("-")[2]) <= step]
    for path in reached[keep_last:]:
        _remove(path)


def _remove(path: Path) -> None:
    """Takes the name away first, so that what is left of a killed removal does not pass for a checkpoint."""
    removed = path.with_name(path.name + ".removed")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _failure(folder: Path, step: int, error: Exception) -> str:
    """What to say, while the half-written checkpoint still takes the room that it needed."""
    before = [path.name for path in find_checkpoints(folder)]
    kept = f"{before[0]} is untouched" if before else "there is none before it"
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    reason = "no space left on the device: " if free < _LITTLE else ""  # torch's own words for it are obscure
    return (
        f"checkpoint-{step} could not be written to {str(folder)!r}: {reason}{error}. {kept}. "
        "Make room and start again with --resume_from_checkpoint latest."
    )


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _files(path: Path) -> Iterator[Path]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return (file for file in files if file != path / CHECKSUMS_FILE)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
