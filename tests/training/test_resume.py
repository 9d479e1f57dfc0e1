"""Checkpoints: what they hold, that a run goes on from them to the bit, and what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from interrupted import HARD_TO_RESUME, at_batch, outcome, start, stop_at_batch, words
from safetensors import SafetensorError
from tiny import sentences, write_rows
from transformers import AutoModelForSequenceClassification

import finetune
import gumbel_attention as ga
from harness import checkpoints
from harness.checkpoints import damage, find_checkpoints, latest, write_checkpoint
from harness.errors import UsageError
from harness.stopping import Stopped


@pytest.fixture
def hard(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | HARD_TO_RESUME


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_tau": "head", "tau_schedule": "constant", "tau_end": None, "mixed_precision": "bf16"},
        {"gradient_checkpointing": True, "noise": "none", "hard": False},
        {"attention": "unpatched", "max_grad_norm": 0.0},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=["scheduled-tau", "learned-tau-bf16", "recomputed", "unpatched", "grouped"],
)
def test_a_run_that_goes_on_from_any_step_ends_as_the_one_that_was_not_stopped(
    hard: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    hard |= changes
    start(hard, output_dir=str(tmp_path / "whole"))
    start(hard, checkpointing_steps=1, keep_last=None)
    expected = outcome(tmp_path / "whole")
    assert expected["steps"] == 6
    assert outcome(tmp_path / "run") == expected, "writing checkpoints changed the run"
    for path in find_checkpoints(tmp_path / "run"):
        again = str(tmp_path / f"from-{path.name}")
        record = start(hard, resume_from_checkpoint=str(path), output_dir=again)
        assert outcome(Path(again)) == expected, path.name
        assert record.resumed_at == [int(path.name.removeprefix("checkpoint-"))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits(
    hard: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    start(hard, output_dir=str(tmp_path / "whole"))
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patched:
        at_batch(3, lambda: signal.raise_signal(number), patched)
        with pytest.raises(SystemExit) as stopped:
            finetune.main(words({key: value for key, value in hard.items() if value is not None}))
    assert stopped.value.code == 75
    error = capfd.readouterr().err
    assert f"{number.name}: finishes the step, saves and exits; a second signal exits at once." in error
    assert f"finetune.py: stopped by {number.name} after step 2, saved in" in error
    assert "--resume_from_checkpoint latest" in error
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    assert names(tmp_path / "run") == ["checkpoint-2", "config.yaml"]
    assert start(hard, resume_from_checkpoint="latest").resumed_at == [2]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_second_signal_exits_at_once() -> None:
    program = (
        "import os, signal, time\nfrom harness.stopping import StopSignals\n"
        "with StopSignals():\n    os.kill(os.getpid(), signal.SIGINT)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(finetune.__file__).parent, timeout=30, capture_output=True, text=True
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.startswith("SIGINT: finishes the step")


def test_a_checkpoint_holds_run_weights_attention_and_checksums(hard: dict[str, Any], tmp_path: Path) -> None:
    start(hard, checkpointing_steps="epoch")
    path = tmp_path / "run" / "checkpoint-6"
    assert names(tmp_path / "run") == ["checkpoint-3", "checkpoint-6", "config.yaml", "model", "results.json"]
    assert names(path) == [
        *("SHA256SUMS", "config.json", "config.yaml", "gumbel_attention.json", "loop_0.pt", "model.safetensors"),
        *("optimizer.bin", "random_states_0.pkl", "run.json", "scheduler.bin"),
    ]
    lines = (path / "SHA256SUMS").read_text().splitlines()
    for name in names(path)[1:]:
        assert f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}" in lines
    assert yaml.safe_load((path / "config.yaml").read_text())["tau_end"] == 0.5
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]])}
    logits = []
    for folder in (path, tmp_path / "run" / "model"):
        model = ga.from_pretrained(AutoModelForSequenceClassification, folder).eval()
        assert ga.patch_of(model).tau[0].item() == pytest.approx(0.5)
        logits.append(model(**batch).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [6]), (2, [4, 6]), (None, [2, 4, 6])])
def test_old_checkpoints_go(hard: dict[str, Any], tmp_path: Path, keep_last: int | None, kept: list[int]) -> None:
    start(hard, checkpointing_steps=2, keep_last=keep_last)
    found = find_checkpoints(tmp_path / "run")
    assert [path.name for path in found] == [f"checkpoint-{step}" for step in reversed(kept)]
    assert not any(damage(path) for path in found)


def _flip(path: Path) -> None:
    content = bytearray((path / "optimizer.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "optimizer.bin").write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (_flip, "optimizer.bin is not what was written"),
    "cut": (
        lambda path: os.truncate(path / "model.safetensors", 99),
        "model.safetensors is not what was written",
    ),
    "lost": (lambda path: (path / "loop_0.pt").unlink(), "loop_0.pt is missing"),
    "foreign": (lambda path: (path / "notes").write_text("x"), "notes is not in SHA256SUMS"),
    "unsealed": (lambda path: (path / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
    "emptied": (lambda path: (path / "SHA256SUMS").write_text(""), "SHA256SUMS is empty"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_latest_passes_over_damaged_and_unfinished_checkpoints_and_says_so(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    stop_at_batch(3, settings, monkeypatch, checkpointing_steps=1, keep_last=None)
    folder, (spoil, words_of_it) = tmp_path / "run", DAMAGES[kind]
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-4.unfinished")
    spoil(folder / "checkpoint-3")
    with pytest.raises(UsageError, match=f"damaged or unfinished: .*{words_of_it}.*'latest', which passes over it"):
        start(settings, resume_from_checkpoint=str(folder / "checkpoint-3"))
    capsys.readouterr()
    assert start(settings, resume_from_checkpoint="latest", checkpointing_steps=1).resumed_at == [2]
    told = capsys.readouterr().out
    assert "passes over checkpoint-4.unfinished: it was never finished" in told
    assert f"passes over checkpoint-3, which is damaged: {words_of_it}" in told
    assert f"goes on from {folder / 'checkpoint-2'}" in told
    assert names(folder) == ["checkpoint-5", "checkpoint-6", "config.yaml", "results.json"]


def test_latest_begins_where_there_is_no_checkpoint(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = start(settings, resume_from_checkpoint="latest")
    assert record.resumed_at == []
    assert "no checkpoint to go on from" in capsys.readouterr().out
    again = start(settings, resume_from_checkpoint="latest")
    assert (again.train, again.final) == (record.train, record.final)
    assert "is finished: nothing to do" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"a finished run of other settings \(there -> here\): tau: 1.0 -> 2.0"):
        start(settings, resume_from_checkpoint="latest", tau=2.0)
    other = write_rows(tmp_path / "other.tsv", sentences(7))
    with pytest.raises(UsageError, match=r"a finished run of other settings .*: validation_file: .*other.tsv"):
        start(settings, resume_from_checkpoint="latest", validation_file=other)
    with pytest.raises(UsageError, match="no such folder"):
        start(settings, resume_from_checkpoint=str(tmp_path / "nowhere"), output_dir=str(tmp_path / "new"))


def test_results_name_the_code_that_each_part_began_with(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commits that are made meanwhile are none of it."""
    commits = [{"commit": letter * 40, "dirty": False} for letter in "abc"]
    code = commits.copy()
    monkeypatch.setattr("harness.results.git_state", lambda _: code[0])
    with monkeypatch.context() as patched:
        at_batch(1, lambda: code.pop(0), patched)
        stop_at_batch(2, settings, patched)
    with monkeypatch.context() as patched:
        at_batch(1, lambda: code.pop(0), patched)
        start(settings, resume_from_checkpoint="latest")
    assert f"the code was [{commits[0]}] and is [{commits[1]}]" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["git"], results["earlier_git"]) == (commits[1], commits[:1])
    start(settings, overwrite_output_dir=True)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["git"] == commits[2]
    assert "earlier_git" not in results


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": 0.5, "learning_rate": 1e-4}, "learning_rate: 0.001 -> 0.0001; tau: 1.0 -> 0.5"),
        ({"seed": 7}, "seed: 0 -> 7"),
        ({"layers": (0,)}, r"layers: None -> \[0\]"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: 8 -> 4.*examples per optimiser step: 8"),
        ({"train_file": "other"}, r"data.train_rows: 24 -> 23.*data.train_sha256"),
    ],
)
def test_a_checkpoint_from_another_configuration_is_refused_with_the_keys(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    stop_at_batch(1, settings, monkeypatch)
    if "train_file" in changes:
        changes = {"train_file": write_rows(tmp_path / "other.tsv", sentences(23))}
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=rf"from another configuration.*\(checkpoint -> now\): .*{message}"):
        start(settings, resume_from_checkpoint="latest", **changes)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_settings_that_change_no_number_may_differ(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_batch(1, settings, monkeypatch)
    moved = shutil.copy(settings["train_file"], tmp_path / "moved.tsv")
    record = start(
        settings, resume_from_checkpoint="latest", checkpointing_steps=2, save_model=True, train_file=str(moved)
    )
    assert record.resumed_at == [1]


def test_an_output_folder_that_holds_another_run_is_refused_unless_told(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UsageError, match="no such file"):
        start(settings, train_file="missing.tsv")
    assert not folder.exists(), "a run that never began leaves no trace that refuses the next"
    stop_at_batch(2, settings, monkeypatch)
    with pytest.raises(UsageError, match=r"holds a run that got to checkpoint-2: choose another, go on with"):
        start(settings)
    other = tmp_path / "other"
    stop_at_batch(1, settings, monkeypatch, output_dir=str(other))
    with pytest.raises(UsageError, match="holds a run that got to checkpoint-2"):
        start(settings, resume_from_checkpoint=str(other / "checkpoint-1"))
    shutil.rmtree(folder / "checkpoint-2")
    with pytest.raises(UsageError, match=r"another run of other settings \(there -> here\): tau: 1.0 -> 3.0"):
        start(settings, tau=3.0)
    stop_at_batch(1, settings, monkeypatch)
    with pytest.raises(UsageError, match="exclude each other"):
        start(settings, overwrite_output_dir=True, resume_from_checkpoint="latest")
    start(settings, overwrite_output_dir=True, tau=3.0, max_train_steps=1)
    assert names(folder) == ["config.yaml", "results.json"]


@pytest.mark.parametrize("way", ["limit", "fsync", "full"])
def test_no_space_left_leaves_the_checkpoint_before(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    way: str,
) -> None:
    resource = pytest.importorskip("resource")
    stop_at_batch(2, settings, monkeypatch, checkpointing_steps=2)
    folder = tmp_path / "run"
    before = {path: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def limited(*args: Any) -> Path:
        soft, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))
        try:
            return write_checkpoint(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, most))

    if way == "full":  # torch says then that a position is unexpected
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    if way == "fsync":
        monkeypatch.setattr(checkpoints.os, "fsync", full)
    else:
        monkeypatch.setattr("harness.loop.write_checkpoint", limited)
    with pytest.raises(SystemExit) as stopped:
        finetune.main(words(settings) + ["--checkpointing_steps=2", "--resume_from_checkpoint=latest"])
    assert stopped.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    reason = "No space left on device" if way == "fsync" else "File too large"
    assert error.startswith(f"finetune.py: error: checkpoint-4 could not be written to {str(folder)!r}: ")
    assert ("no space left on the device: " in error) == (way == "full")
    assert reason in error
    assert "checkpoint-2 is untouched. Make room and start again with --resume_from_checkpoint latest." in error
    assert names(folder) == ["checkpoint-2", "config.yaml"]
    assert before == {path: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O: File too large")])
def test_no_space_left_for_the_model_is_said_too(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(finetune.Classification, "save_model", full)
    with pytest.raises(SystemExit) as stopped:
        finetune.main(words(settings | {"save_model": True, "max_train_steps": 1}))
    assert stopped.value.code == 1
    assert f"finetune.py: error: no space left: {error}. Checkpoints are untouched." in capsys.readouterr().err


def test_a_signal_during_evaluation_is_heard_after_it(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, heard = finetune.Classification.evaluate, []

    def signalled(*args: Any) -> Any:
        if not heard:
            heard.append(signal.raise_signal(signal.SIGTERM))
        return evaluate(*args)

    monkeypatch.setattr(finetune.Classification, "evaluate", signalled)
    with pytest.raises(Stopped, match="after step 3"):
        start(settings)
    run = json.loads((tmp_path / "run" / "checkpoint-3" / "run.json").read_text())
    assert [entry["mode"] for entry in run["record"]["evaluation"]] == ["noise_off", "noise_on"]


def test_a_name_is_given_only_to_a_checkpoint_that_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever file operation the writing breaks off, the newest checkpoint found is sound."""
    accelerator = Accelerator(cpu=True)

    def write(folder: Path) -> None:
        (folder / "a").write_text("new" * 100)
        (folder / "b").write_text("new")

    class Killed(BaseException):
        pass

    ends = []
    for survives in range(15):
        folder, left = tmp_path / str(survives), [survives]
        for step in (1, 2):
            write_checkpoint(folder, step, write, 2, accelerator)

        def dying(operation: Any, left: list[int] = left) -> Any:
            def die_or_do(*args: Any, **options: Any) -> Any:
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return operation(*args, **options)

            return die_or_do

        with monkeypatch.context() as patched:
            for owner, name in ((checkpoints.os, "fsync"), (Path, "rename"), (Path, "write_text")):
                patched.setattr(owner, name, dying(getattr(owner, name)))
            patched.setattr(checkpoints.shutil, "rmtree", dying(shutil.rmtree))
            with contextlib.suppress(Killed):
                write_checkpoint(folder, 3, write, 2, accelerator)
        found = find_checkpoints(folder)
        assert latest(folder, lambda _: None) == found[0], "every folder that bears the name is sound"
        assert len(found) >= 2
        ends.append([path.name.removeprefix("checkpoint-") for path in found])
    assert ends == [["2", "1"]] * 9 + [["3", "2", "1"]] * 4 + [["3", "2"]] * 2


def test_resuming_before_a_checkpoint_that_exists_replaces_it(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_batch(4, settings, monkeypatch, checkpointing_steps=1, keep_last=None)
    folder = tmp_path / "run"
    marked = folder / "checkpoint-4" / "run.json"
    marked.write_text(json.dumps(json.loads(marked.read_text())))
    start(settings, resume_from_checkpoint=str(folder / "checkpoint-2"), checkpointing_steps=2, keep_last=None)
    assert [path.name for path in find_checkpoints(folder)] == [f"checkpoint-{step}" for step in (6, 4, 3, 2, 1)]
    assert not damage(folder / "checkpoint-4")
