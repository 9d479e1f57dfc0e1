"""What users switch on beside the attention: checkpointing, compilation, bf16, fp16. The noise must be what it was.

No dropout, sentences of one length, and weights so large that the noise moves the loss by far more than rounding does.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from interrupted import outcome, start
from safetensors.torch import load_file
from tiny import run as run_once
from tiny import write_rows
from torch._dynamo.exc import RecompileError
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from transformers import BertConfig, BertForSequenceClassification, BertModel

import finetune
import gumbel_attention as ga
from gumbel_attention.state import AttentionState
from harness import run as run_module
from harness.errors import UsageError
from harness.loop import TrainingRecord

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ARMS = {"soft": {"hard": False}, "st": {"hard": True}}
CHECKPOINTING = {"gradient_checkpointing": True}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
INDUCTOR = {"torch_compile": True}
BF16 = {"mixed_precision": "bf16"}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": CHECKPOINTING,
    "compiled": INDUCTOR,
    "bf16": BF16,
    "compiled-checkpointing": COMPILED | CHECKPOINTING,
    "compiled-bf16": COMPILED | BF16,
    "checkpointing-bf16": CHECKPOINTING | BF16,
}
TOLERANCE = {"no": 1e-5, "bf16": 5 * 3 * 2**-9, "fp16": 5 * 3 * 2**-12}
"""Of a loss; in half precision five roundings (scores, weights, output, features, logits) of losses up to 3."""
FAR = 5 * TOLERANCE["bf16"]


pytestmark = [  # of the compiler
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _compile_afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    plain_cpp = inductor_config.patch({"cpp.simdlen": 1})  # a third of the time; test_noise.py has the vectors
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), plain_cpp:
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def rough(bert: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a BERT of one layer without dropout, whose scores are far from equal."""
    folder = tmp_path_factory.mktemp("rough")
    shutil.copytree(bert, folder, dirs_exist_ok=True)
    torch.manual_seed(1)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vocabulary = BertConfig.from_pretrained(bert).vocab_size
    config = BertConfig(
        vocab_size=vocabulary, max_position_embeddings=32, initializer_range=0.5, **SIZES, **no_dropout
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(settings: dict[str, Any], rough: str, tmp_path: Path) -> dict[str, Any]:
    """A run of four optimiser steps, each at another temperature."""
    words = itertools.product(("a", "the"), ("film", "plot"), ("fine", "dull", "warm", "weak"))
    rows = [(" ".join(sentence), int(sentence[-1] in ("fine", "warm"))) for sentence in words]
    return settings | {
        "model_name_or_path": rough,
        "train_file": write_rows(tmp_path / "train.tsv", rows),
        "validation_file": write_rows(tmp_path / "dev.tsv", rows[:4]),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "tau_schedule": "linear",
        "tau_end": 0.4,
    }


@pytest.fixture
def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations are left out: each of their modes is compiled by itself."""
    monkeypatch.setattr(finetune, "evaluate", lambda *args: {"loss": 0.0})


def run(settings: dict[str, Any], **changes: Any) -> TrainingRecord:
    """A run in a state of Accelerate's own, for which one process makes one run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    counters.clear()
    return run_once(settings, **changes)


def losses(record: TrainingRecord) -> list[float]:
    return [entry["loss"] for entry in record.train]


def distance(one: TrainingRecord, other: TrainingRecord) -> float:
    assert len(losses(one)) == len(losses(other)) == 4
    return max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))


def run_with_other_noise(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> TrainingRecord:
    """The same weights and batches; the seed of what is drawn in training is another one."""
    set_seed = run_module.set_seed
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "set_seed", lambda seed, **own: set_seed(seed + (1000 if own else 0), **own))
        return run(settings, **changes)


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_leaves_the_noise_as_it_was(settings: dict[str, Any], option: str, arm: str) -> None:
    """The same seed gives the same run twice, and that of the plain model but for rounding."""
    changes = ARMS[arm] | OPTIONS[option]
    plain, first = run(settings, **ARMS[arm]), run(settings, **changes)
    compiled = "torch_compile" in changes
    assert bool(counters["stats"]["unique_graphs"]) == compiled
    assert distance(first, plain) <= TOLERANCE[changes.get("mixed_precision", "no")]
    if compiled and "mixed_precision" in changes:  # compiled anew in each run: eager stands for the second one
        eager = {name: value for name, value in changes.items() if name not in COMPILED}
        assert distance(first, run(settings, **eager)) <= TOLERANCE["no"]
    else:
        assert losses(run(settings, **changes)) == losses(first)


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("arm", ARMS)
def test_other_noise_and_no_noise_are_far_away(
    settings: dict[str, Any], arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tolerances must tell apart."""
    plain = run(settings, **ARMS[arm])
    assert distance(run_with_other_noise(settings, monkeypatch, **ARMS[arm]), plain) > FAR
    assert distance(run_with_other_noise(settings, monkeypatch, **ARMS[arm], **CHECKPOINTING, **BF16), plain) > FAR
    assert distance(run(settings, **ARMS[arm], noise="none"), plain) > FAR
    assert distance(run(settings, **ARMS[arm], attention="unpatched"), plain) > FAR


@pytest.mark.usefixtures("no_evaluation")
def test_checkpointing_that_draws_anew_is_seen(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The recomputed layer gets other noise than the forward pass had: the gradients, hence the losses, move."""
    plain, enable = run(settings), run_module.enable_checkpointing

    def without_replay(model: Any) -> None:
        enable(model)
        for layer in model.bert.encoder.layer:
            recompute = torch.utils.checkpoint.checkpoint
            layer._gradient_checkpointing_func = partial(recompute, use_reentrant=False, preserve_rng_state=False)

    monkeypatch.setattr(run_module, "enable_checkpointing", without_replay)
    assert distance(run(settings, **CHECKPOINTING), plain) > 100 * TOLERANCE["no"]


def test_compiled_evaluation_checkpoints_and_the_saved_model(settings: dict[str, Any], tmp_path: Path) -> None:
    """Three graphs in all: training, evaluation without noise, evaluation with it; a resumed run has the same bits."""
    plain = run(settings, output_dir=str(tmp_path / "plain"))
    common = {**settings, **COMPILED, "save_model": True, "checkpointing_steps": 2, "keep_last": None}
    whole = run(common, output_dir=str(tmp_path / "whole"))
    assert counters["stats"]["unique_graphs"] == 3
    assert [entry["mode"] for entry in whole.evaluation] == ["noise_off", "noise_on"]
    scores = [[entry["loss"] for entry in record.evaluation] for record in (whole, plain)]
    assert scores[0] == pytest.approx(scores[1], abs=TOLERANCE["no"])
    assert abs(scores[1][0] - scores[1][1]) > 0.05, "noise changes this loss"

    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again = {**common, "overwrite_output_dir": False, "output_dir": str(tmp_path / "again")}
    AcceleratorState._reset_state(reset_partial_state=True)
    start(again, resume_from_checkpoint=str(checkpoint))
    assert outcome(tmp_path / "again") == outcome(tmp_path / "whole")
    bare = BertForSequenceClassification(BertConfig.from_pretrained(settings["model_name_or_path"]))
    for folder in (checkpoint, tmp_path / "whole" / "model"):
        assert set(load_file(folder / "model.safetensors")) == set(bare.state_dict())
    loaded = ga.from_pretrained(BertForSequenceClassification, tmp_path / "whole" / "model")
    assert ga.patch_of(loaded).tau[0].item() == pytest.approx(0.4)


@pytest.mark.usefixtures("no_evaluation")
def test_no_temperature_compiles_the_model_again(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with torch._dynamo.config.patch(error_on_recompile=True):
        record = run(settings, **COMPILED)
        assert len({entry["tau"] for entry in record.train}) == 4
        monkeypatch.setattr(AttentionState, "number", 1.0, raising=False)
        monkeypatch.setattr(AttentionState, "tau", property(lambda state: torch.full((), state.number)))
        monkeypatch.setattr(AttentionState, "set_tau", lambda state, tau: setattr(state, "number", tau))
        torch._dynamo.reset()
        with pytest.raises(RecompileError):
            run(settings, **COMPILED)


def test_a_compiler_without_compilation_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="torch_compile_backend=inductor needs torch_compile: true"):
        run(settings, torch_compile_backend="inductor")


def test_fp16_is_refused_on_a_cpu(settings: dict[str, Any]) -> None:
    """Accelerate would train in float32 without a word."""
    assert Accelerator(mixed_precision="fp16").native_amp is False
    with pytest.raises(UsageError, match="mixed_precision fp16 needs a GPU"):
        run(settings, mixed_precision="fp16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Accelerate takes fp16 on GPUs only, and there is none")
@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("arm", ARMS)
def test_fp16_on_a_gpu(settings: dict[str, Any], arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    plain, half = run(settings, **ARMS[arm]), run(settings, **ARMS[arm], mixed_precision="fp16")
    assert losses(run(settings, **ARMS[arm], mixed_precision="fp16")) == losses(half)
    assert distance(half, plain) <= TOLERANCE["fp16"]


@pytest.mark.parametrize("arm", ARMS)
def test_fp16_with_scaled_gradients(rough: str, arm: str) -> None:
    """What Accelerate does with fp16, without it: autocast and a gradient scaler, which a CPU has too."""
    plain = _scaled_losses(rough, ARMS[arm], half=False)
    first = _scaled_losses(rough, ARMS[arm], half=True)
    assert _scaled_losses(rough, ARMS[arm], half=True) == first != plain
    assert first == pytest.approx(plain, abs=TOLERANCE["fp16"])
    other = _scaled_losses(rough, ARMS[arm], half=True, seed=1)
    assert max(abs(a - b) for a, b in zip(other, plain, strict=True)) > FAR


def _scaled_losses(folder: str, arm: dict[str, Any], half: bool, seed: int = 0) -> list[float]:
    """Four steps of a patched model; the gradient scaler finds nothing to pass over."""
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(folder).train()
    patch = ga.patch_model(model, ga.GumbelAttentionConfig(**arm))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=half)
    ids = torch.randint(4, model.config.vocab_size, (4, 5), generator=torch.Generator().manual_seed(0))
    found = []
    torch.manual_seed(seed)
    for step in range(4):
        patch.set_tau(1.0 - 0.15 * step)
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = model(input_ids=ids, labels=ids[:, 0] % 2).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(loss.item())
    assert not half or scaler.get_scale() == 2.0**10
    return found
