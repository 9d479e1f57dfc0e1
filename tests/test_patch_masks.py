"""The masks of patched models: no tensor of the size of the scores, and the same logits."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

import gumbel_attention as ga
from gumbel_attention.impl import cpu
from gumbel_attention.integrations.transformers.masks import CAUSAL_PADDING, compact_mask
from models import PLAIN, build, fingerprint, inputs, logits, real, without_dropout

LENGTH = 1024
ST = ga.GumbelAttentionConfig(hard=True)


class Largest(TorchDispatchMode):
    """Notes the most elements that the memory of any tensor made in it has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def long_batch(padding: str) -> dict[str, Tensor]:
    tokens = torch.randint(5, 99, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    if padding == "none":
        return {"input_ids": tokens}
    keep = torch.ones_like(tokens)
    keep[0, LENGTH // 2 :] = 0
    return {"input_ids": tokens, "attention_mask": keep if padding == "right" else keep.flip(1)}


def long_model(name: str) -> Any:
    import models

    changes = {"max_position_embeddings": LENGTH, "n_positions": LENGTH}
    config = models.CONFIGS[name]()
    for key, value in changes.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return models.ZOO[name].from_config(config, attn_implementation="sdpa")


@pytest.mark.skipif(cpu.available() is not None, reason=f"native kernels: {cpu.available()}")
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("config", [ST, PLAIN], ids=["gumbel-st", "softmax"])
def test_a_patched_model_builds_nothing_of_the_size_of_the_scores(
    name: str, padding: str, config: ga.GumbelAttentionConfig
) -> None:
    model = without_dropout(long_model(name)).train()
    ga.patch_model(model, config)
    with Largest() as largest:
        model(**long_batch(padding)).logits.square().mean().backward()
    assert largest.elements < LENGTH * LENGTH / 2


def test_the_unpatched_padded_model_does_build_it() -> None:
    with Largest() as largest, torch.no_grad():
        long_model("llama").eval()(**long_batch("right"))
    assert largest.elements >= LENGTH * LENGTH


def test_partly_patched_models_keep_their_own_masks() -> None:
    model = build("llama")
    batch = inputs(model, "right")
    want = logits(model, batch)
    with ga.patch_model(model, ga.GumbelAttentionConfig(noise="none", layers=[0])):
        assert model.model.config._attn_implementation == "sdpa"
        torch.testing.assert_close(real(batch, logits(model, batch)), real(batch, want), rtol=0, atol=1e-5)


def test_two_patches_that_complete_each_other_and_their_order_of_removal() -> None:
    model = build("llama")
    before = fingerprint(model)
    first = ga.patch_model(model, ga.GumbelAttentionConfig(noise="none", layers=[0]))
    second = ga.patch_model(model, ga.GumbelAttentionConfig(noise="none", layers=[1]))
    assert model.model.config._attn_implementation == "gumbel_attention"
    batch = inputs(model, "left")
    patched = logits(model, batch)
    with pytest.raises(RuntimeError, match="reverse order"):
        first.remove()
    second.remove()
    assert model.model.config._attn_implementation == "sdpa"
    first.remove()
    assert fingerprint(model) == before
    torch.testing.assert_close(real(batch, patched), real(batch, logits(model, batch)), rtol=0, atol=1e-5)


@contextmanager
def nothing_shared(model: Any, other: Any) -> Iterator[None]:
    yield
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_copies_and_pickles_are_patched_on_their_own(name: str, way: Any) -> None:
    model = build(name)
    patch = ga.patch_model(model, ga.GumbelAttentionConfig(noise="none", hard=True))
    batch = inputs(model, "right")
    want = logits(model, batch)
    other = way(model)
    with nothing_shared(model, other):
        torch.testing.assert_close(logits(other, batch), want, rtol=0, atol=0)
    patch.remove()
    torch.testing.assert_close(logits(other, batch), want, rtol=0, atol=0)
    other.config.use_cache = not other.config.use_cache
    inner = next(module for module in other.modules() if module is not other and hasattr(module, "config"))
    assert inner.config.use_cache is other.config.use_cache
    assert inner.config.use_cache is not model.config.use_cache


def test_a_change_of_the_models_config_reaches_its_patched_parts_and_outlives_the_patch() -> None:
    model = build("llama")
    with ga.patch_model(model, PLAIN):
        model.config.use_cache = False
        assert model.model.config.use_cache is False
        assert model.model.layers[0].self_attn.config.use_cache is False
    assert model.model.config.use_cache is False


def test_a_copy_of_a_patched_models_config_alone_is_plain() -> None:
    model = build("bert").bert
    ga.patch_model(model, PLAIN)
    assert model.config._attn_implementation == "gumbel_attention"
    for copied in (copy.deepcopy(model.config), copy.copy(model.config)):
        assert copied._attn_implementation == "sdpa"
        assert "_view_of" not in vars(type(copied))


def mask(function: Any = causal_mask_function, padding: Tensor | None = None, **settings: Any) -> Tensor | None:
    lengths = {"q_length": 6, "kv_length": 6, **settings}
    return compact_mask(batch_size=2, mask_function=function, attention_mask=padding, device="cpu", **lengths)


def test_only_a_causal_padded_whole_sequence_gets_the_compact_causal_mask() -> None:
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool()
    compact = mask(padding=padding)
    assert compact is not None
    assert compact.dtype == CAUSAL_PADDING
    assert compact.shape == (2, 1, 1, 6)
    assert mask(padding=torch.ones(2, 6).bool()) is None
    assert mask() is None
    for other in (
        mask(sliding_window_causal_mask_function(3), padding),
        mask(padding=padding, q_length=3, q_offset=3),
        mask(padding=padding, q_length=3),
    ):
        assert other is not None
        assert other.dtype == torch.bool
        assert other.shape[-2] > 1


def test_a_model_that_calculates_with_the_compact_mask_raises() -> None:
    compact = mask(padding=torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool())
    assert compact is not None
    for calculate in (lambda m: m + torch.ones(6), lambda m: ~m, lambda m: m & torch.ones(6).bool(), lambda m: 1 - m):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            calculate(compact)


def test_a_causal_model_that_is_switched_to_eager_after_patching_stays_causal() -> None:
    model = build("llama", "sdpa")
    ga.patch_model(model, PLAIN)
    model.set_attn_implementation("eager")
    batch = inputs(model)
    before = logits(model, batch)
    torch.testing.assert_close(before, logits(build("llama", "eager"), batch), rtol=0, atol=1e-5)
    batch["input_ids"][:, -1] += 1
    assert torch.equal(logits(model, batch)[:, :-1], before[:, :-1])
    model.set_attn_implementation("sdpa")
    assert model.model.config._attn_implementation == "gumbel_attention"
