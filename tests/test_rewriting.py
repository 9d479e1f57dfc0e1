"""Attention that writes its softmax by hand: found, rewritten, exact without noise, and undone."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import gumbel_attention as ga
from gumbel_attention.integrations import rewriting
from gumbel_attention.integrations.rewritten_softmax import SoftmaxState
from models import ENCODER, HARD, HEADS, LAYERS, PLAIN, TOKENS, VOCAB, fingerprint, real, without_dropout

ST = ga.GumbelAttentionConfig(hard=True)
SMALL = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, **TOKENS}
SIDES: dict[str, Any] = {f"num_{side}_layers": LAYERS for side in ("encoder", "decoder")}
SIDES |= {f"num_{side}_attention_heads": HEADS for side in ("encoder", "decoder")}
SIDES |= {f"{side}_ffn_dim": 40 for side in ("encoder", "decoder")}

# What is particular about each: the mechanism by which it comes to its softmax.
MODELS: dict[str, Callable[[], Any]] = {
    # a dtype argument
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=LAYERS, n_head=HEADS, **TOKENS)),
    # scaled_dot_product_attention called directly
    "falcon": lambda: hf.FalconForCausalLM._from_config(hf.FalconConfig(**SMALL), attn_implementation="sdpa"),
    # nn.Softmax(dim=-1)(scores), with a cache
    "codegen": lambda: hf.CodeGenForCausalLM(
        hf.CodeGenConfig(n_embd=32, n_layer=LAYERS, n_head=HEADS, rotary_dim=4, n_positions=64, **TOKENS)
    ),
    # a submodule
    "squeezebert": lambda: hf.SqueezeBertModel(hf.SqueezeBertConfig(embedding_size=32, **ENCODER)),
    # a softmax over a convolution kernel beside the attention
    "convbert": lambda: hf.ConvBertModel(
        hf.ConvBertConfig(embedding_size=32, head_ratio=2, conv_kernel_size=3, **ENCODER)
    ),
    # dim=3, einsum
    "xlnet": lambda: hf.XLNetModel(hf.XLNetConfig(d_model=32, n_layer=LAYERS, n_head=HEADS, d_inner=40, **TOKENS)),
    # rows that are no rows of attention, changed in place afterwards
    "longformer": lambda: hf.LongformerModel(hf.LongformerConfig(attention_window=4, **ENCODER)),
    # a helper function outside the class
    "prophetnet": lambda: hf.ProphetNetForConditionalGeneration(
        hf.ProphetNetConfig(
            hidden_size=32, max_position_embeddings=64, ngram=2, decoder_start_token_id=2, **SIDES, **TOKENS
        )
    ),
}
CAUSAL = ("bloom", "falcon", "codegen")
CASES = [(n, p) for n in MODELS for p in ("none", "right", "left") if p != "left" or n in CAUSAL]


def build(name: str) -> Any:
    return copy.deepcopy(_original(name))


@functools.cache
def _original(name: str) -> Any:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = MODELS[name]()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return model.eval()


def batch_of(name: str, padding: str = "none") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(5, VOCAB, (3, 12), generator=generator)}
    if padding != "none":
        keep = torch.ones_like(batch["input_ids"])
        keep[0, 8:] = 0
        keep[1, 5:] = 0
        batch["attention_mask"] = keep if padding == "right" else keep.flip(1)
    if name == "longformer":
        batch["global_attention_mask"] = torch.zeros_like(batch["input_ids"]).index_fill(1, torch.tensor([0]), 1)
    if name == "prophetnet":
        batch["decoder_input_ids"] = torch.randint(5, VOCAB, (3, 7), generator=generator)
        batch["decoder_attention_mask"] = torch.ones(3, 7, dtype=torch.long)
    return batch


def output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(**batch)[0]
    return result


def reached(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if rewriting.softmax_calls(type(module))]


@contextmanager
def patched(model: nn.Module, config: ga.GumbelAttentionConfig = PLAIN) -> Iterator[list[SoftmaxState]]:
    modules = reached(model)
    states = [SoftmaxState(config, HEADS, module) for module in modules]
    for module, state in zip(modules, states, strict=True):
        state.enter(module)
    yield states
    for module, state in zip(modules, states, strict=True):
        state.leave(module)


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_the_plain_softmax_gives_the_model_itself(name: str, padding: str) -> None:
    model, batch = build(name), batch_of(name, padding)
    before = fingerprint(model)
    with torch.no_grad():
        expected = output(model, batch)
        with patched(model) as states:
            assert len(states) >= LAYERS
            got = output(model, batch)
            assert all(state.ran for state in states)
            assert list(model.state_dict()) == before["keys"]
        torch.testing.assert_close(real(batch, got), real(batch, expected), atol=1e-5, rtol=0)
        assert torch.equal(output(model, batch), expected)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_a_hard_choice_changes_the_output_and_teaches_the_projections(name: str) -> None:
    model, batch = without_dropout(build(name)), batch_of(name, "right")
    expected = output(model, batch)
    trained = gradients(model, batch)
    with patched(model, HARD):
        assert (output(model, batch) - expected).abs().max() > 1e-2
        hard = gradients(model, batch)
    assert {n for n, g in hard.items() if g.any()} >= {n for n, g in trained.items() if g.abs().max() > 1e-7}


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    output(model, batch).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_noise_in_training_and_none_in_eval(name: str) -> None:
    model, batch = without_dropout(build(name)).train(), batch_of(name)
    with torch.no_grad(), patched(model, ST):
        one, other = output(model, batch), output(model, batch)
        torch.manual_seed(0)
        first = output(model, batch)
        torch.manual_seed(0)
        assert torch.equal(output(model, batch), first)
        assert not torch.equal(one, other)
        model.eval()
        assert torch.equal(output(model, batch), output(model, batch))


@pytest.mark.parametrize("name", MODELS)
def test_copies_stay_patched_and_others_unpatched(name: str) -> None:
    model, batch = build(name), batch_of(name)
    with torch.no_grad(), patched(model, HARD) as states:
        expected = output(model, batch)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(output(twin, batch), expected)
            assert sum(isinstance(module, SoftmaxState) for module in twin.modules()) == len(states)
            assert [type(module).__name__ for module in twin.modules()] == [type(m).__name__ for m in model.modules()]
        assert not torch.equal(output(build(name), batch), expected)


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_generation_is_the_same(name: str) -> None:
    model, batch = build(name), batch_of(name, "left")
    expected = model.generate(**batch, max_new_tokens=5, do_sample=False)
    with patched(model):
        assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), expected)


def test_the_convolution_kernel_of_convbert_stays() -> None:
    (layer, *_) = reached(build("convbert"))
    assert rewriting.softmax_calls(type(layer)) == ["forward: nn.functional.softmax(attention_scores, dim=-1)"]


def test_notes_say_where_rows_are_no_rows_of_attention() -> None:
    noted = {name for name in MODELS if any(rewriting.notes(type(module)) for module in reached(build(name)))}
    assert noted == {"longformer", "prophetnet"}


def test_heads_laid_out_by_windows_are_refused() -> None:
    (layer, *_) = reached(build("longformer"))
    with pytest.raises(ValueError, match="laid out by windows"):
        SoftmaxState(ga.GumbelAttentionConfig(heads=0), HEADS, layer)
