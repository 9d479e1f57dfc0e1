"""--dry_run: what it says agrees with what a run does, and it leaves nothing behind."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from interrupted import stop_at_batch
from interrupted import words as words_of
from tiny import run, sentences, write_rows

import finetune
import language_model
import story_qa
import transduction
from forked import run_in_two
from harness import dry_run as module
from harness.arguments import FinetuneArguments
from harness.dry_run import LiveBytes, estimated_bytes, state_bytes


def words(settings: dict[str, Any]) -> list[str]:
    as_words = {
        key: ",".join(map(str, value)) if isinstance(value, tuple) else value for key, value in settings.items()
    }
    return [*words_of(as_words), "--dry_run"]


def report_of(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], settings: dict[str, Any]) -> Any:
    capsys.readouterr()
    main(words(settings))
    out = capsys.readouterr().out
    return yaml.safe_load(out[out.index("configuration:") :])


def test_it_says_what_the_run_then_does(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings |= {"gradient_accumulation_steps": 2, "hard": True, "heads": (1,), "layers": (0,)}
    settings |= {"tau_schedule": "linear", "tau_end": 0.5}
    report = report_of(capsys, finetune.main, settings)
    assert not Path(settings["output_dir"]).exists()
    args = FinetuneArguments(**settings)
    assert report["configuration"] == args.to_dict()
    assert report["data"]["training examples"] == 24
    assert report["data"]["evaluation examples"] == 11
    assert report["data"]["batches of each process in an epoch"] == 3
    assert report["data"]["first batch"]["labels"] == "[8]"
    assert report["attention"]["tau"] == {"at the first step": 1.0, "in the middle": 0.75, "at the end": 0.5}
    assert report["attention"]["layers"] == {
        "bert.encoder.layer.0.attention.self": (
            "BertSelfAttention, by registry; heads: [1] of 2; implementation: reference"
        )
    }
    record = run(settings)
    assert report["data"]["optimiser steps"] == record.steps == 4
    assert report["output_dir"].endswith("run: a run would begin in it")


def test_the_temperatures_that_are_learned_are_counted(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = report_of(capsys, finetune.main, settings | {"attention": "unpatched"})
    assert plain["attention"] == "the model's own"
    learned = report_of(capsys, finetune.main, settings | {"learn_tau": "head", "tau": 2.0})
    assert learned["attention"]["tau"] == "learned per head, from 2.0"
    assert learned["parameters"]["learned temperatures"] == 4
    assert learned["parameters"]["all"] == plain["parameters"]["all"] + 4 == learned["parameters"]["trained"]


OUTPUT_DIR: dict[str, tuple[dict[str, Any], str]] = {
    "finished": ({}, "a run would be refused: output_dir .* holds a finished run"),
    "overwritten": ({"overwrite_output_dir": True}, "the run in it would be removed"),
    "the same": ({"resume_from_checkpoint": "latest"}, "is finished, there is nothing to do"),
    "another": (
        {"resume_from_checkpoint": "latest", "learning_rate": 0.5},
        r"a run would be refused: .*learning_rate: 0\.001 -> 0\.5",
    ),
}


@pytest.mark.parametrize("case", OUTPUT_DIR)
def test_a_folder_with_a_finished_run_is_told_and_left_alone(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], case: str
) -> None:
    run(settings, checkpointing_steps=4)
    folder = Path(settings["output_dir"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changes, message = OUTPUT_DIR[case]
    report = report_of(capsys, finetune.main, settings | changes)
    assert re.search(message, report["output_dir"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_that_was_stopped_would_go_on(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_batch(3, settings, monkeypatch)
    report = report_of(capsys, finetune.main, settings | {"resume_from_checkpoint": "latest"})
    assert report["output_dir"].endswith("run: a run would go on from checkpoint-3")
    report = report_of(capsys, finetune.main, settings | {"resume_from_checkpoint": "latest", "tau": 2.0})
    assert "checkpoint-3 is of other settings (there -> here): tau: 1.0 -> 2.0" in report["output_dir"]
    report = report_of(capsys, finetune.main, settings)
    assert "holds a run that got to checkpoint-3" in report["output_dir"]


def test_bad_settings_still_end_with_status_2(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        finetune.main(words(settings | {"train_file": "missing.tsv"}))
    assert stopped.value.code == 2
    assert "no such file" in capsys.readouterr().err


def test_every_script_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question.\n" * 9)
    (tmp_path / "words").write_text("ab\tabs\tV;3\nbad\tbads\tV;3\ncab\tcabbed\tV;PST\n")
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}
    texts = {"train_file": str(tmp_path / "text.txt"), "validation_file": str(tmp_path / "text.txt")}
    pairs = {"train_file": str(tmp_path / "words"), "validation_file": str(tmp_path / "words"), "width": 16}
    language = {
        "model_config": gpt2,
        "tokenizer_name": "characters",
        "block_size": 12,
        "cache_dir": str(tmp_path / "c"),
    }
    (tmp_path / "language.yaml").write_text(yaml.safe_dump(language | texts))
    stories = {"train_stories": 30, "validation_stories": 7, "supporting_facts": 2}
    out = {"output_dir": str(tmp_path / "run"), "max_train_steps": 3}
    language_report = report_of(capsys, language_model.main, out | {"config": tmp_path / "language.yaml"})
    assert language_report["data"]["first batch"] == {"input_ids": "[32, 12]", "labels": "[32, 12]"}
    assert list(language_report["attention"]["layers"]) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    pairs_report = report_of(capsys, transduction.main, pairs | out)
    assert pairs_report["attention"]["layers"] == {
        "model.decoder.layers.0.encoder_attn": ("MarianAttention, by registry; heads: 4; implementation: reference")
    }
    story_report = report_of(capsys, story_qa.main, stories | out)
    assert len(story_report["attention"]["layers"]) == 2
    for report in (language_report, pairs_report, story_report):
        assert report["data"]["optimiser steps"] == 3
        assert "measured over the first batch" in report["memory of each process"]["activations"]
    assert not (tmp_path / "run").exists()


def _into_files(folder: Path, words: list[str]) -> None:
    """One process of two: what it prints, errors apart."""
    with (folder / f"printed_{os.environ['RANK']}").open("w") as file, redirect_stdout(file):
        finetune.main(words)


@pytest.mark.slow
def test_of_several_processes_the_main_one_prints(settings: dict[str, Any], tmp_path: Path) -> None:
    run_in_two(_into_files, tmp_path, words(settings), log=tmp_path / "log")
    report, silence = ((tmp_path / f"printed_{rank}").read_text() for rank in (0, 1))
    assert silence == ""
    report = yaml.safe_load(report)
    assert report["data"]["processes"] == 2
    assert report["data"]["batches of each process in an epoch"] == 2
    memory = report["memory of each process"]
    assert memory["gradients in the buckets of DistributedDataParallel"] == memory["gradients"]
    assert not Path(settings["output_dir"]).exists()


# Memory


def test_states_are_what_adamw_keeps() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
    model[2].requires_grad_(False)
    model.double()
    model[0].float()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()

    def size(tensors: Any) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    assert state_bytes(model) == {
        "weights": size(model.state_dict().values()),
        "gradients": size(p.grad for p in model.parameters() if p.grad is not None),
        "optimiser": size(value for state in optimizer.state.values() for value in state.values()),
    }


def test_live_bytes_of_operations_that_are_known() -> None:
    x = torch.ones(1000)
    with LiveBytes([x]) as live:
        y = x * 2  # 4000
        x.mul_(1)
        z = y.view(10, 100)
        assert (live.alive, live.peak) == (4000, 4000)
        w = y + 1  # 8000
        del y
        assert live.alive == 8000, "a view keeps its storage"
        del z
        assert (live.alive, live.peak) == (4000, 8000)
        v = w.double()  # 4000 + 8000
        assert (live.alive, live.peak) == (12000, 12000)
        del v, w
        assert (live.alive, live.peak) == (0, 12000)


def test_live_bytes_sees_what_autograd_keeps_and_what_checkpointing_does_not_keep() -> None:
    def block() -> list[torch.nn.Module]:
        return [torch.nn.Linear(64, 64), torch.nn.Tanh()]

    blocks = torch.nn.Sequential(*(torch.nn.Sequential(*block(), *block()) for _ in range(8)))
    x, outputs = torch.randn(100, 64), []
    for checkpointed in (False, True):
        with LiveBytes([x, *blocks.parameters()]) as live:
            y = x
            for each in blocks:
                y = torch.utils.checkpoint.checkpoint(each, y, use_reentrant=False) if checkpointed else each(y)
            outputs.append(live.peak / x.nbytes)
            del y
    assert outputs[0] == 17, "sixteen outputs of tanh, which it keeps, and that of the last linear layer"
    assert 8 < outputs[1] <= 10, "the eight blocks' outputs, and those within the last"


def test_a_pass_that_would_take_long_is_extrapolated_from_two_rows(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows have one length, so that the whole is linear in them but for what does not grow with them."""
    rows = [(text, label) for text, label in sentences(60) if len(text.split()) == 3]
    settings |= {"train_file": write_rows(tmp_path / "same.tsv", rows)}
    sizes = {}
    for name, seconds in (("measured", 60.0), ("an estimate: the forward pass, linear in the rows", 0.0)):
        monkeypatch.setattr(module, "SECONDS", seconds)
        text = report_of(capsys, finetune.main, settings)["memory of each process"]["activations"]
        assert name in text
        sizes[name] = float(text.split(" ")[0])
    assert sizes["an estimate: the forward pass, linear in the rows"] == pytest.approx(sizes["measured"], rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_formula_where_no_pass_is_made(
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpointing: bool,
) -> None:
    monkeypatch.setattr(module, "OPERATIONS", 0.0)
    report = report_of(capsys, finetune.main, settings | {"gradient_checkpointing": checkpointing})
    said = report["memory of each process"]["activations"]
    assert "an estimate by the formula of Korthikanti et al. 2022 for 2 layers, width 16, 2 heads, 8 x " in said
    length = int(report["data"]["first batch"]["input_ids"].strip("[]").split(",")[1])
    layer = 8 * length * 16 * 66 + 8 * 2 * length**2 * 9
    expected = layer + 2 * 8 * length * 16 * 4 if checkpointing else 2 * layer
    assert float(said.split(" ")[0]) == pytest.approx(expected / 1024, rel=1e-3)
    assert "implementation: not known" in str(report["attention"]["layers"])


def test_the_formula_needs_the_sizes_of_the_model() -> None:
    args = FinetuneArguments(train_file="a.tsv", validation_file="b.tsv")
    found, why = estimated_bytes(torch.nn.Linear(2, 2), {"x": torch.ones(2, 2)}, args)
    assert found is None
    assert "not known by a formula" in why


def test_implementations_are_those_of_the_size(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings |= {"per_device_train_batch_size": 24, "impl": "blockwise"}
    layers = report_of(capsys, finetune.main, settings)["attention"]["layers"]
    assert all(text.endswith("implementation: blockwise") for text in layers.values())
