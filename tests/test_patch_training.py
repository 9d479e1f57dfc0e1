"""Training a patched model: modes, seeds, noise switches, checkpointing, precision, learned temperatures, compilation,
and the copies and files that are made of it."""

import copy

import pytest
import torch
import torch._dynamo.testing

import gumbel_attention as ga
import models
from models import build, inputs, logits, loss_gradients, trained, worst_difference

Config = ga.GumbelAttentionConfig
SOFT, ST = Config(tau=0.5), Config(hard=True)
ARCHITECTURES = ["bert", "gpt2", "llama", "t5"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def bert():
    """A patched BERT in train mode, and its patch."""
    model = trained("bert")
    return model, ga.patch_model(model, SOFT)


def _seeded(model, seed=0, **settings):
    torch.manual_seed(seed)
    return logits(model, **settings)


@pytest.mark.parametrize("config", [SOFT, ST], ids=["soft", "straight-through"])
@pytest.mark.parametrize("name", models.ZOO)
def test_noise_follows_the_mode_and_the_seed(name, config):
    model = trained(name)
    ga.patch_model(model, config)
    one = logits(model)
    assert not torch.allclose(logits(model), one, **CLOSE)
    assert torch.equal(_seeded(model), _seeded(model))
    assert not torch.allclose(_seeded(model, 0), _seeded(model, 1), **CLOSE)
    model.eval()
    state = torch.get_rng_state()
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_layer_draws_noise_of_its_own():
    model, hidden = trained("bert"), torch.randn(3, 12, 32)
    first, second = model.bert.encoder.layer
    second.load_state_dict(first.state_dict())
    for layer in (first, second):
        layer.register_forward_pre_hook(lambda module, args: (hidden, *args[1:]))
    patch = ga.patch_model(model, ST)
    with torch.no_grad():
        one, two = model(**inputs(model), output_attentions=True).attentions
        patch.noise(False)
        same = model(**inputs(model), output_attentions=True).attentions
    assert not torch.equal(one, two)
    assert torch.equal(*same)


def test_eval_noise_keeps_the_noise_and_eval_hard_decides_the_choice():
    model = build("bert")
    with ga.patch_model(model, Config(eval_noise=True)):
        assert not torch.equal(logits(model), logits(model))
    with ga.patch_model(model, Config(noise="none")):
        soft = logits(model)
    with ga.patch_model(model, Config(noise="none", hard=True)):
        hard = logits(model)
    with ga.patch_model(model, Config(hard=True, eval_hard=False)):
        assert torch.equal(logits(model), soft)
    with ga.patch_model(model, Config(eval_hard=True)):
        assert torch.equal(logits(model), hard)
    assert not torch.allclose(soft, hard, atol=0.1)


def test_the_noise_switch_outranks_the_mode_and_nests(bert):
    model, patch = bert
    noisy, normal = _seeded(model), None
    with patch.noise(False):
        quiet = _seeded(model)
        with patch.noise("normal"):
            normal = _seeded(model)
            with patch.noise(None):
                assert torch.equal(_seeded(model), noisy)
            assert torch.equal(_seeded(model), normal)
        assert torch.equal(_seeded(model), quiet)
    assert torch.equal(_seeded(model), noisy)
    assert len({tuple(x.flatten().tolist()) for x in (noisy, quiet, normal)}) == 3
    model.eval()
    assert torch.equal(_seeded(model), quiet)
    patch.noise(True)
    assert torch.equal(_seeded(model), noisy)
    patch.noise("none")
    assert torch.equal(_seeded(model.train()), quiet)


def test_contexts_restore_what_was_before_an_exception(bert):
    model, patch = bert
    before = _seeded(model)
    with patch.set_tau(3.0):
        assert [tau.item() for tau in patch.tau] == [3.0, 3.0]
    with pytest.raises(ZeroDivisionError), patch.noise(False), patch.set_tau(3.0):
        raise ZeroDivisionError
    assert torch.equal(_seeded(model), before)
    assert [tau.item() for tau in patch.tau] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("tau", "error"),
    [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), (float("inf"), ValueError)]
    + [(x, TypeError) for x in ("0.5", None, True)],
)
def test_a_bad_temperature_is_refused_and_changes_nothing(bert, tau, error):
    model, patch = bert
    before = _seeded(model)
    with pytest.raises(error, match="tau"):
        patch.set_tau(tau)
    assert torch.equal(_seeded(model), before)


def test_a_bad_noise_switch_is_refused_and_changes_nothing(bert):
    model, patch = bert
    before = _seeded(model)
    for switch, error in (("gumbal", ValueError), ("foo", ValueError), (1, TypeError), (0.5, TypeError)):
        with pytest.raises(error, match="noise"):
            patch.noise(switch)
    assert torch.equal(_seeded(model), before)
    other = build("bert")
    mixed = ga.patch_model(other, [Config(layers=[0]), Config(noise="none", layers=[1])])
    with pytest.raises(ValueError, match="noise='none'"):
        mixed.noise(True)
    assert torch.equal(logits(other), logits(other))


@pytest.mark.parametrize("config", [SOFT, ST], ids=["soft", "straight-through"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_checkpointing_draws_the_same_noise_again(name, config):
    model = trained(name)
    ga.patch_model(model, config)
    plain = loss_gradients(model)
    assert worst_difference(plain, loss_gradients(model, seed=1)) > 0.1

    def checkpointed(**settings):
        newer = hasattr(model, "activation_checkpointing_enable")  # renamed in transformers 5.2x
        enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
        enable(settings)
        return worst_difference(plain, loss_gradients(model))

    assert checkpointed(use_reentrant=False) < 1e-5
    assert checkpointed(use_reentrant=True) < 1e-5
    assert checkpointed(use_reentrant=False, preserve_rng_state=False) > 0.1  # the control: other noise is noticed


@pytest.mark.parametrize("learn_tau", ["scalar", "head"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_learned_temperature_gets_a_gradient_and_learns(name, learn_tau):
    model = trained(name)
    patch = ga.patch_model(model, Config(tau=0.5, hard=True, learn_tau=learn_tau))
    parameters = patch.learned_tau_parameters()
    assert {tuple(p.shape) for p in parameters} == {(models.HEADS,) if learn_tau == "head" else (1,)}
    assert {id(p) for p in parameters} <= {id(p) for p in model.parameters()}
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    loss_gradients(model)
    assert all(p.grad.isfinite().all() and (p.grad != 0).all() for p in parameters)
    optimizer.step()
    assert all((tau > 0).all() and (tau != 0.5).all() for tau in patch.tau)
    with pytest.raises(RuntimeError, match="learn"):
        patch.set_tau(1.0)


@pytest.mark.parametrize("learn_tau", [None, "head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_cast_model_keeps_its_temperature_in_float32(name, dtype, learn_tau):
    model = trained(name)
    patch = ga.patch_model(model, Config(tau=0.3, learn_tau=learn_tau))
    model.to(dtype)
    assert all(tau.dtype == torch.float32 for tau in patch.tau)
    torch.testing.assert_close(patch.tau[0].flatten()[0], torch.tensor(0.3))
    assert logits(model).dtype == dtype
    assert all(gradient.isfinite().all() for gradient in loss_gradients(model).values())


@pytest.mark.parametrize("config", [SOFT, ST], ids=["soft", "straight-through"])
@pytest.mark.parametrize("name", [name for name in models.ZOO if name != "gpt_oss"])
def test_autocast_trains_without_a_cache_too(name, config):
    model = trained(name)
    model.config.use_cache = False  # a cache casts keys and values to one dtype, and training has none
    ga.patch_model(model, config)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = loss_gradients(model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize(("name", "backend"), [("bert", "aot_eager"), ("llama", "eager")])
def test_compiled_it_is_one_graph_that_draws_eagers_noise_at_any_temperature(name, backend):
    model = trained(name)
    patch = ga.patch_model(model, SOFT)
    batch = inputs(model, "right") | ({} if name == "bert" else {"use_cache": False})
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for tau in (0.5, 0.3, 2.0):
        patch.set_tau(tau)
        torch.manual_seed(0)
        expected = model(**batch).logits
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(**batch).logits, expected, **CLOSE)
    assert counter.frame_count == 1
    patch.remove()
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, **CLOSE)


def test_a_deep_copy_is_patched_and_has_its_own_temperature():
    model = build("llama")
    patch = ga.patch_model(model, Config(noise="none", tau=0.5))
    twin, twin_patch = copy.deepcopy((model, patch))
    before = logits(model)
    assert torch.equal(logits(twin), before)
    twin_patch.set_tau(3.0)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(twin), before)
    twin_patch.remove()
    assert torch.equal(logits(twin), logits(build("llama")))
    assert torch.equal(logits(model), before)


def test_a_pickled_model_is_patched_and_has_the_temperature_it_had(tmp_path):
    model = build("bert")
    ga.patch_model(model, Config(noise="none", tau=0.5)).set_tau(0.25)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings("ignore:this configuration was saved by a model with Gumbel attention")
@pytest.mark.parametrize("learn_tau", [None, "head"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_saved_patched_model_reloads_as_a_plain_one(name, learn_tau, tmp_path):
    model = build(name)
    expected = logits(model)
    patch = ga.patch_model(model, Config(learn_tau=learn_tau))
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    torch.testing.assert_close(logits(loaded.eval()), expected, **CLOSE)
    assert not report["missing_keys"]
    unexpected = {f"{layer.name}.gumbel.log_tau" for layer in patch.layers} if learn_tau else set()
    assert set(report["unexpected_keys"]) == unexpected
    assert not any("gumbel" in key for key in loaded.state_dict())


def test_a_schedule_moves_the_layers_that_do_not_learn_their_temperature():
    model = build("bert")
    with ga.patch_model(model, [Config(learn_tau="scalar", layers=0), Config(layers=1)]) as patch:
        with patch.set_tau(0.25):
            assert [tau.item() for tau in patch.tau] == [1.0, 0.25]
        assert [tau.item() for tau in patch.tau] == [1.0, 1.0]


def test_the_noise_scale_is_state_that_can_be_set_while_training():
    model = trained("bert")
    patch = ga.patch_model(model, SOFT)
    batch = inputs(model, "right")

    def output():
        torch.manual_seed(0)
        return model(**batch).logits

    loud = output()
    with patch.set_noise_scale(0.5):
        assert not torch.allclose(output(), loud)
    assert torch.equal(output(), loud)
    with patch.set_noise_scale(0.0):
        silent = output()
    with patch.noise(False):
        torch.testing.assert_close(silent, output(), rtol=1e-5, atol=1e-5)
    for bad, error in ((-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="noise_scale"):
            patch.set_noise_scale(bad)
    patch.remove()
    without = ga.patch_model(model, ga.GumbelAttentionConfig(noise_scale=0.0))
    with pytest.raises(RuntimeError, match="noise_scale=0"):
        without.set_noise_scale(1.0)


@pytest.mark.parametrize(("config", "length"), [(ga.GumbelAttentionConfig(noise="none"), 7), (SOFT, 64)])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_checkpointing_repeats_what_the_forward_pass_took(name, config, length):
    model = trained(name, "sdpa")
    ga.patch_model(model, config)
    batch = inputs(model, "right", length)

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(**batch).logits.float().square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    newer = hasattr(model, "activation_checkpointing_enable")  # renamed in transformers 5.2x
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert worst_difference(gradients(), want) < 1e-5


def test_the_attentions_a_model_returns_are_those_its_output_comes_from():
    model = trained("bert", "eager")
    ga.patch_model(model, ga.GumbelAttentionConfig(noise="none"))
    result = model(**inputs(model), output_attentions=True)
    result.attentions[0].retain_grad()
    result.logits.sum().backward()
    assert result.attentions[0].grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # by the compiler
def test_a_second_sequence_length_compiles_in_one_graph_too():
    model = trained("bert", "sdpa").eval()
    ga.patch_model(model, ga.GumbelAttentionConfig(noise="none", hard=True))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (7, 9, 12):
        batch = inputs(model, "right", length) if length > 7 else inputs(model, "none", length)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, **CLOSE)
    torch._dynamo.reset()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("learn_tau", ["scalar", "head"])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_learned_temperature_stays_positive_through_rough_steps_and_is_saved(name, learn_tau, hard, tmp_path):
    model = trained(name)
    patch = ga.patch_model(model, Config(tau=0.5, hard=hard, learn_tau=learn_tau))
    optimizer = torch.optim.Adam(patch.learned_tau_parameters(), lr=0.5)  # a step of 0.5 would take tau itself below 0
    low = 0.5
    for seed in range(8):
        loss_gradients(model, seed=seed)
        optimizer.step()
        low = min(low, *(tau.min().item() for tau in patch.tau))
    assert 0 < low < 0.2
    assert all(tau.isfinite().all() for tau in patch.tau)
    model.eval().save_pretrained(tmp_path)
    loaded = ga.from_pretrained(type(model), tmp_path).eval()
    restored = ga.patch_of(loaded)
    assert all(torch.equal(one, two) for one, two in zip(patch.tau, restored.tau, strict=True))
    assert len(restored.learned_tau_parameters()) == len(patch.layers)
    assert all(parameter.requires_grad for parameter in restored.learned_tau_parameters())
    assert torch.equal(logits(loaded), logits(model))
