"""Noise by seeds belongs to positions in sequences: with a cache as without one, and wherever the padding is."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import gumbel_attention as ga
import models
from gumbel_attention.integrations.transformers import registry
from models import build, fingerprint, inputs

NOISY = ga.GumbelAttentionConfig(eval_noise=True)
SEEDS = torch.tensor([5, -9])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CACHES = {
    "default": lambda config: None,
    "dynamic without windows": lambda config: hf.DynamicCache(),
    "static": lambda config: hf.StaticCache(config, max_cache_len=20),
}


def noisy(name: str) -> tuple[Any, Any]:
    model = build(name)
    return model, ga.patch_model(model, NOISY)


def tokens(model: Any, length: int = 12) -> Tensor:
    ids: Tensor = inputs(model, length=length)["input_ids"][:2]
    return ids


def left_padded(ids: Tensor, by: int) -> dict[str, Tensor]:
    keep = torch.nn.functional.pad(torch.ones_like(ids), (by, 0))
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": torch.nn.functional.pad(ids, (by, 0)),
        "attention_mask": keep,
        "position_ids": positions,
    }


def whole(model: Any, **batch: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch, use_cache=False).logits
    return logits


def stepwise(model: Any, sizes: list[int], cache: Any = None, **batch: Tensor) -> Tensor:
    """The logits of steps of these sizes, which share a cache; masks reach from the first token to the step's last."""
    parts, start = [], 0
    for size in sizes:
        end = start + size
        now = {name: x[:, (0 if name == "attention_mask" else start) : end] for name, x in batch.items()}
        with torch.no_grad():
            output = model(**now, past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, end
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def decoded(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits of an encoder and decoder, whose decoder goes token by token."""
    cache, parts = None, []
    mask = {"attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
    with torch.no_grad():
        encoded = model.get_encoder()(batch["input_ids"], **mask)
        for token in batch["decoder_input_ids"].split(1, dim=1):
            step = {"encoder_outputs": encoded, "decoder_input_ids": token, **mask}
            output = model(**step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_steps_with_a_cache_draw_what_the_whole_sequence_draws(name: str, cache: str) -> None:
    model, patch = noisy(name)
    ids = tokens(model)
    with patch.seeds(SEEDS):
        expected = whole(model, input_ids=ids)
        got = stepwise(model, [3, 1, 1, 2, 1, 1, 1, 1, 1], CACHES[cache](model.config), input_ids=ids)
    torch.testing.assert_close(got, expected, **CLOSE)
    with patch.seeds(SEEDS + 1):  # the control
        assert (whole(model, input_ids=ids) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padding_on_the_left_changes_no_noise(name: str, cache: str) -> None:
    model, patch = noisy(name)
    ids = tokens(model)
    padded = left_padded(ids, 4)
    with patch.seeds(SEEDS):
        expected = whole(model, input_ids=ids)
        torch.testing.assert_close(whole(model, **padded)[:, 4:], expected, **CLOSE)
        for sizes in ([6, *[1] * 10], [3, 2, 2, *[1] * 9]):  # the first step of the second is padding alone
            got = stepwise(model, sizes, CACHES[cache](model.config), **padded)
            torch.testing.assert_close(got[:, 4:], expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_text_is_generated_alike_alone_and_in_a_batch(name: str) -> None:
    model, patch = noisy(name)
    ids = tokens(model, 7)
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    keep = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    with patch.seeds(SEEDS):
        together = model.generate(ids * keep, attention_mask=keep, **settings)
    with patch.seeds(SEEDS[:1]):
        for use_cache in (True, False):
            alone = model.generate(ids[:1, 3:], attention_mask=keep[:1, 3:], use_cache=use_cache, **settings)
            assert torch.equal(together[:1, 3:], alone)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_with_a_cache_draws_what_it_draws_without(name: str) -> None:
    model, patch = noisy(name)
    batch = {key: x[:2] for key, x in inputs(model, length=6).items()}
    with patch.seeds(SEEDS):
        expected = whole(model, **batch)
        torch.testing.assert_close(decoded(model, batch), expected, **CLOSE)
        if name == "t5":  # as many keys as queries, and its positions are relative
            padded = {**left_padded(batch["input_ids"], 1), "decoder_input_ids": batch["decoder_input_ids"]}
            del padded["position_ids"]
            torch.testing.assert_close(whole(model, **padded), expected, **CLOSE)
            torch.testing.assert_close(decoded(model, padded), expected, **CLOSE)


def test_layers_that_take_another_layers_keys_stand_where_the_others_do() -> None:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3nTextConfig(
        **{**models.HEAD_DIM, "num_hidden_layers": 6},
        vocab_size_per_layer_input=models.VOCAB,
        hidden_size_per_layer_input=8,
        sliding_window=5,
        num_kv_shared_layers=3,
        layer_types=layers * 2,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=None,
    )
    model = hf.Gemma3nForCausalLM(config).eval()
    patch = ga.patch_model(model, NOISY)
    ids = tokens(model)
    with patch.seeds(SEEDS):
        got, expected = stepwise(model, [3, *[1] * 9], input_ids=ids), whole(model, input_ids=ids)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_cache_that_was_filled_without_seeds_does_if_it_shows_no_padding() -> None:
    model, patch = noisy("llama")
    ids = tokens(model)
    for batch in (left_padded(ids, 0), left_padded(ids, 2)):
        cache = hf.DynamicCache()
        stepwise(model, [6], cache, **batch)
        rest = {name: x if name == "attention_mask" else x[:, 6:] for name, x in batch.items()}
        with patch.seeds(SEEDS), torch.no_grad():
            if bool(batch["attention_mask"].all()):
                model(**rest, past_key_values=cache)
                continue
            with pytest.raises(NotImplementedError, match=r"LlamaAttention .* a cache that was filled without seeds"):
                model(**rest, past_key_values=cache)
            with patch.noise(False):  # nothing is drawn
                model(**rest, past_key_values=cache)


def test_a_cache_of_other_examples_is_refused() -> None:
    model, patch = noisy("llama")
    batch, cache = left_padded(tokens(model), 2), hf.DynamicCache()
    with patch.seeds(SEEDS):
        stepwise(model, [6], cache, **batch)
    cache.batch_repeat_interleave(2)
    rest = {name: x.repeat_interleave(2, 0)[:, 0 if name == "attention_mask" else 6 :] for name, x in batch.items()}
    with patch.seeds(SEEDS.repeat_interleave(2)), pytest.raises(NotImplementedError, match="4 examples and a cache"):
        model(**rest, past_key_values=cache)


@pytest.mark.parametrize("seen", [0, 3])
def test_a_call_whose_positions_do_not_show_is_refused_after_the_first(seen: int) -> None:
    module, cache = torch.nn.Module(), hf.DynamicCache()
    query, key = torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, seen + 2, 8)
    if seen:
        cache.update(key[..., :seen, :], key[..., :seen, :], 0)
    call = registry.Call(cache, 0, seen, own=True)
    cache.update(key[..., seen:, :], key[..., seen:, :], 0)
    unknown: list[tuple[Any, Tensor, bool]] = [
        (None if seen else call, key, False),
        (call, key, True),
        (call, torch.zeros(2, 4, seen + 5, 8), False),
        (call._replace(own=False), key, False),
    ]
    assert registry.offsets(module, call, query, key, None, False) == (seen, 0)
    for noted, keys, sink_key in unknown:
        if seen == 0:
            assert registry.offsets(module, noted, query, keys, None, sink_key) == (0, 0)
            continue
        with pytest.raises(NotImplementedError, match="Module does not show those of this call"):
            registry.offsets(module, noted, query, keys, None, sink_key)


def test_rewritten_attention_that_uses_a_cache_is_refused() -> None:
    config = hf.FalconConfig(**{**models.TOKENS, **models.SIZE, "alibi": False, "new_decoder_architecture": False})
    model = hf.FalconForCausalLM(config).eval()
    patch = ga.patch_model(model, NOISY)
    ids = tokens(model)
    with patch.seeds(SEEDS):
        expected = whole(model, input_ids=ids)
        assert torch.equal(whole(model, input_ids=ids), expected)
        with pytest.raises(NotImplementedError, match="does not say where its 1 queries stand among 5 keys"):
            stepwise(model, [4, 1], input_ids=ids)
    stepwise(model, [4, 1], input_ids=ids)  # without seeds all is as it was


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_whole_sequences_that_begin_at_the_left_have_no_offsets(
    name: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def attend(*args: Any, **kwargs: Any) -> Any:
        given.extend((kwargs["q_offset"], kwargs["k_offset"]))
        return original(*args, **kwargs)

    original = registry.attend
    monkeypatch.setattr(registry, "attend", attend)
    model, patch = noisy(name)
    with patch.seeds(torch.arange(3)):
        models.logits(model, inputs(model, padding))
    assert given
    assert all(type(offset) is int and offset == 0 for offset in given)


def test_a_removed_patch_leaves_no_hook_and_a_call_no_cache() -> None:
    model = build("llama")
    before = fingerprint(model)
    hooks = [(list(module._forward_pre_hooks), list(module._forward_hooks)) for module in model.modules()]
    patch = ga.patch_model(model, NOISY)
    with patch.seeds(SEEDS):
        stepwise(model, [4, 1], input_ids=tokens(model))
    assert all(state.call is None for state in patch._states)
    patch.remove()
    assert fingerprint(model) == before
    assert [(list(module._forward_pre_hooks), list(module._forward_hooks)) for module in model.modules()] == hooks
    assert not any(module._forward_pre_hooks_with_kwargs for module in model.modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # by the compiler
def test_compiled_steps_draw_the_same() -> None:
    model = build("llama")
    patch = ga.patch_model(model, ga.GumbelAttentionConfig(eval_noise=True, layers=[0]))
    padded = left_padded(tokens(model), 2)
    with patch.seeds(SEEDS):
        expected = whole(model, input_ids=tokens(model))
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(stepwise(compiled, [13, 1], **padded)[:, 2:], expected, **CLOSE)
