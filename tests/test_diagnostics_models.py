"""What is measured of whole models: padding, caches, checkpoints, and training steps that stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import gumbel_attention as ga
from models import ENCODER, HEADS, TOKENS, build, inputs, trained

ALL = 10**6


def patched(name: str, **settings: Any) -> Any:
    """A model in training with dropout in its attention; bloom's computes its scores itself."""
    if name == "bloom":
        torch.manual_seed(0)
        config = hf.BloomConfig(hidden_size=32, n_layer=2, n_head=HEADS, attention_dropout=0.1, **TOKENS)
        model: Any = hf.BloomForCausalLM(config).train()
    elif name == "deberta":
        torch.manual_seed(0)
        model = hf.DebertaV2ForTokenClassification(hf.DebertaV2Config(**ENCODER)).train()
    else:
        model = build(name).train()
    ga.patch_model(model, ga.GumbelAttentionConfig(**settings))
    return model


@pytest.mark.parametrize("name", ["bert", "llama", "bloom"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(name: str, side: str) -> None:
    model = patched(name)
    batch = inputs(model, side)
    real = int(batch["attention_mask"].sum())

    def found(changed: Tensor) -> tuple[dict[str, Tensor], list[int]]:
        torch.manual_seed(0)
        with ga.collect_diagnostics(model, ALL) as diagnostics:
            model(**{**batch, "input_ids": changed})
        return diagnostics.summary(), [int(count) for count in diagnostics.counted().values()]

    values, counts = found(batch["input_ids"])
    single = 0 if name == "bert" else 3  # of each example, the causal query that sees itself alone
    assert counts == [(real - single) * HEADS] * 2
    pads = batch["input_ids"].where(batch["attention_mask"].bool(), 7)
    torch.testing.assert_close(found(pads)[0], values, rtol=1e-6, atol=1e-7)
    first = batch["input_ids"].where(~batch["attention_mask"].bool(), 7)  # a control
    assert found(first)[0]["entropy"] != values["entropy"]


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bloom", "deberta"])
@pytest.mark.parametrize("hard", [False, True])
def test_a_training_step_is_the_same_to_the_bit(name: str, hard: bool, checkpointing: bool | None) -> None:
    model = patched(name, hard=hard, tau=0.7, heads=(0, 2) if name == "llama" else None)
    if checkpointing is not None:
        newer = hasattr(model, "activation_checkpointing_enable")  # renamed in transformers 5.2x
        enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
        enable({"use_reentrant": checkpointing})

    def step() -> tuple[Tensor, dict[str, Tensor], Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        output = model(**inputs(model, "right")).logits
        output.square().mean().backward()
        gradients = {key: x.grad.clone() for key, x in model.named_parameters() if x.grad is not None}
        return output.detach(), gradients, torch.get_rng_state()

    without = step()
    with ga.collect_diagnostics(model) as diagnostics:
        within = step()
    torch.testing.assert_close(within, without, rtol=0.0, atol=0.0)
    heads = 2 if name == "llama" else HEADS
    assert [int(n) for n in diagnostics.counted().values()] == [16 * heads] * len(diagnostics.layers)  # none twice
    torch.manual_seed(3)
    with ga.collect_diagnostics(model) as diagnostics:
        output = model(**inputs(model, "right")).logits
    torch.testing.assert_close(output.detach(), without[0], rtol=0.0, atol=0.0)
    model.zero_grad()
    output.square().mean().backward()  # after the context, where checkpoints compute again without being watched
    gradients = {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
    torch.testing.assert_close(gradients, without[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "bart"])
def test_generation_with_a_cache_is_measured_as_the_whole_sequence_is(name: str) -> None:
    model = patched(name, eval_noise=False).eval()
    batch = {"input_ids": inputs(model)["input_ids"]}
    model.generation_config.eos_token_id = None
    with ga.collect_diagnostics(model, ALL) as steps:
        sequence = model.generate(**batch, do_sample=False, max_new_tokens=6, pad_token_id=0)
    decoder = {"decoder_input_ids": sequence[:, :-1]} if name == "bart" else {}
    whole = batch if decoder else {"input_ids": sequence[:, :-1]}
    with ga.collect_diagnostics(model, ALL) as once, torch.no_grad():
        model(**whole, **decoder)
    assert once.counted() == steps.counted()
    torch.testing.assert_close(steps.per_layer(), once.per_layer(), rtol=1e-4, atol=1e-5)
    with ga.collect_diagnostics(model, ALL) as shorter, torch.no_grad():  # a control: a query less
        model(
            **{key: x[:, :-1] if x.shape[1] == sequence.shape[1] - 1 else x for key, x in {**whole, **decoder}.items()}
        )
    assert shorter.counted() != steps.counted()


def test_layers_and_heads_that_are_not_patched() -> None:
    model = trained("bert")
    ga.patch_model(model, ga.GumbelAttentionConfig(layers=[1], heads=(0, 3)))
    wrapped = nn.ModuleDict({"module": model, "idle": ga.GumbelSetAttention(8)})
    with ga.collect_diagnostics(wrapped, ALL) as diagnostics:
        model(**inputs(model))
    (name,) = diagnostics.per_layer()
    assert name == "module.bert.encoder.layer.1.attention.self"
    assert diagnostics.counted()[name].item() == 3 * 12 * 2
    assert diagnostics.layers == [name, "idle"]
    assert diagnostics.unmeasured == ["idle"]
