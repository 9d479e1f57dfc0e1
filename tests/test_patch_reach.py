"""What patch_model reaches by rewriting, and what it refuses by name."""

import pytest
import torch
import transformers as hf

import gumbel_attention as ga
import models
from models import HARD, PLAIN, fingerprint, inputs, logits, real

Config = ga.GumbelAttentionConfig
STACK = {"n_layer": 1, "n_head": 4}
UNREACHABLE = {
    "mamba": (hf.MambaForCausalLM, lambda: hf.MambaConfig(hidden_size=32, num_hidden_layers=1, **models.TOKENS)),
    "fnet": (hf.FNetModel, lambda: hf.FNetConfig(**models.TOKENS, hidden_size=32, num_hidden_layers=1)),
    "siglip": (hf.SiglipVisionModel, lambda: hf.SiglipVisionConfig(image_size=16, patch_size=8, **models.SIZE)),
}


@pytest.mark.parametrize(
    ("name", "match"),
    [("mamba", "state space"), ("fnet", "Fourier"), ("siglip", "'head.attention': .*GumbelMultiheadAttention")],
)
@pytest.mark.parametrize("layers", [None, "*"])
def test_a_model_that_cannot_be_reached_is_refused_and_stays_as_it_was(name, match, layers):
    cls, config = UNREACHABLE[name]
    model = cls(config()).eval()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=match):
        ga.patch_model(model, Config(noise="none", layers=layers))
    assert fingerprint(model) == before


def test_the_reachable_part_of_a_model_can_be_asked_for():
    cls, config = UNREACHABLE["siglip"]
    patch = ga.patch_model(cls(config()), Config(layers=["*.self_attn"]))
    assert [layer.name.rsplit(".", 1)[1] for layer in patch.layers] == ["self_attn"] * models.LAYERS


def _bigbird_pegasus():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 40))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    start = {"decoder_start_token_id": 2, "attention_type": "original_full"}
    return hf.BigBirdPegasusConfig(d_model=32, **start, **sizes, **heads, **models.TOKENS)


REWRITTEN = {
    "bloom": (hf.BloomForCausalLM, lambda: hf.BloomConfig(hidden_size=32, **STACK, **models.TOKENS), {"rewrite"}),
    "xlnet": (
        hf.XLNetLMHeadModel,
        lambda: hf.XLNetConfig(d_model=32, d_inner=40, **STACK, **models.TOKENS),
        {"rewrite"},
    ),
    "bigbird_pegasus": (hf.BigBirdPegasusForConditionalGeneration, _bigbird_pegasus, {"rewrite", "registry"}),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_attention_written_by_hand_is_reached_by_rewriting(name):
    cls, config, ways = REWRITTEN[name]
    model = cls(config()).eval()
    before, batch = fingerprint(model), inputs(model, "right")
    want = logits(model, batch)
    with ga.patch_model(model, PLAIN) as patch:
        assert {layer.way for layer in patch.layers} == ways
        torch.testing.assert_close(real(batch, logits(model, batch)), real(batch, want), rtol=0, atol=1e-5)
    with ga.patch_model(model, HARD):
        assert not torch.allclose(logits(model, batch), want, atol=1e-3)
    assert fingerprint(model) == before
    assert torch.equal(logits(model, batch), want)


@pytest.mark.parametrize("name", ["bert", "bloom"])
def test_a_patched_layer_that_attends_without_us_is_an_error_at_its_first_call(name, monkeypatch):
    model = models.build("bert") if name == "bert" else REWRITTEN["bloom"][0](REWRITTEN["bloom"][1]()).eval()
    patch = ga.patch_model(model, HARD)
    module = model.get_submodule(patch.layers[0].name)
    monkeypatch.setattr(type(module), "forward", lambda self, hidden_states, *args, **kwargs: (hidden_states, None))
    with pytest.raises(RuntimeError, match="did not come to Gumbel attention"):
        logits(model)


def test_the_check_of_the_first_call_is_gone_after_it_and_with_the_patch():
    model = models.build("bert")
    module = model.get_submodule("bert.encoder.layer.0.attention.self")
    with ga.patch_model(model, HARD):
        assert len(module._forward_hooks) == 1
        logits(model)
        assert not module._forward_hooks
    with ga.patch_model(model, HARD):
        pass
    assert not module._forward_hooks
