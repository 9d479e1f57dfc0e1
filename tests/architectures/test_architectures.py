"""Every text architecture of the installed transformers under patch_model; ``--all-architectures`` for all of them."""

from __future__ import annotations

import copy

import pytest
import torch

import gumbel_attention as ga
from models import fingerprint, without_dropout

from .case import (
    ARMS,
    DECODER_LENGTH,
    HARD,
    LENGTH,
    NOISY,
    PADDINGS,
    PLAIN,
    changed_at,
    difference,
    output,
    over_tokens,
    real,
)
from .softmaxes import softmaxes

CLOSE = 1e-5
CHANGED = 1e-3
SEED = 3


def test_every_softmax_over_tokens_is_ours(case, record_property):
    record_property("attention", len({site.module for site in case.attention}))
    if not case.attention:
        assert "no attention that patch_model can reach" in case.refusal
        return
    assert not case.refusal
    model = case.model()
    patch = ga.patch_model(model, HARD)
    record_property("ways", sorted({layer.way for layer in patch.layers}))
    record_property("layers", len(patch.layers))
    output(model, case.inputs())  # BigBird exchanges its attention modules when it first sees a short input
    ran = set()
    for layer in patch.layers:
        model.get_submodule(layer.name).register_forward_hook(lambda *_, name=layer.name: ran.add(name))
    sites = over_tokens(softmaxes(model, case.inputs()))
    assert {(site.module, site.kind) for site in sites if not site.ours} == set()
    assert ran == {layer.name for layer in patch.layers}


def test_a_refused_model_stays_as_it_was(case):
    if not case.refusal:
        pytest.skip("patch_model takes it")
    model = case.model()
    expected, before = output(model, case.inputs(), SEED), fingerprint(model)
    with pytest.raises(ValueError):
        ga.patch_model(model, HARD)
    assert fingerprint(model) == before
    assert torch.equal(output(model, case.inputs(), SEED), expected)


def test_without_noise_it_equals_eager(taken):
    eager, worst = taken.model("eager"), {}
    for implementation in taken.implementations:
        model = taken.model(implementation)
        for padding in PADDINGS:
            batch = taken.inputs(padding)
            expected, theirs = real(batch, output(eager, batch)), real(batch, output(model, batch))
            with ga.patch_model(model, PLAIN):
                ours = real(batch, output(model, batch))
            worst[implementation, padding] = difference(ours, expected), difference(theirs, expected)
    assert all(ours < CLOSE for ours, _ in worst.values()), f"difference to eager (ours, unpatched): {worst}"


def test_a_hard_choice_changes_the_output(taken):
    batch = taken.inputs("right")
    expected = real(batch, output(taken.model("eager"), batch))
    for implementation in taken.implementations:
        model = taken.model(implementation)
        ga.patch_model(model, HARD)
        assert difference(real(batch, output(model, batch)), expected) > CHANGED


def test_training_is_noisy_and_eval_is_not(taken):
    batch = taken.inputs("right")
    model = without_dropout(taken.model())
    patch = ga.patch_model(model, NOISY)
    assert torch.equal(output(model, batch), output(model, batch))
    model.train()
    torch.manual_seed(SEED)
    one, two, same = output(model, batch), output(model, batch), output(model, batch, SEED)
    assert difference(real(batch, one), real(batch, two)) > CHANGED
    assert torch.equal(one, same)
    with patch.noise(False):
        assert torch.equal(output(model, batch), output(model, batch))


def test_removal_leaves_nothing(taken):
    for implementation in taken.implementations:
        model, batch = taken.model(implementation), taken.inputs("left")
        expected, before = output(model, batch), fingerprint(model)
        with ga.patch_model(model, NOISY):
            output(model, batch)
        assert fingerprint(model) == before
        assert torch.equal(output(model, batch), expected)


def test_a_second_model_of_the_same_config_object_is_untouched(taken):
    model, batch = taken.model(), taken.inputs("right")
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    expected, before = output(other, batch), fingerprint(other)
    ga.patch_model(model, HARD)
    output(model, batch)
    assert fingerprint(other) == before
    assert torch.equal(output(other, batch), expected)


def _learning(model, names, batch):
    """The matrices of these modules whose gradient is not zero."""
    torch.manual_seed(SEED)
    model(**batch)[0].float().square().mean().backward()
    found = set()
    for name in names:
        for key, parameter in model.get_submodule(name).named_parameters():
            if parameter.ndim > 1 and parameter.grad is not None and parameter.grad.abs().max() > 0:
                assert parameter.grad.isfinite().all(), f"{name}.{key}"
                found.add(f"{name}.{key}")
    return found


def test_gradient_reaches_every_projection(taken):
    batch = taken.inputs("right")
    model = without_dropout(taken.model()).train()
    plain = copy.deepcopy(model)
    names = [layer.name for layer in ga.patch_model(model, NOISY).layers]
    ours, theirs = _learning(model, names, batch), _learning(plain, names, batch)
    assert theirs
    assert theirs - ours == set()


def test_a_future_token_never_changes_an_earlier_position(taken):
    batch = taken.inputs()
    decoder = "decoder_input_ids" in batch
    key, length = ("decoder_input_ids", DECODER_LENGTH) if decoder else ("input_ids", LENGTH)
    other = changed_at(batch, key, torch.arange(length) == length - 2)

    def earlier(model):
        one, two = output(model, batch, SEED), output(model, other, SEED)
        if one.shape[:2] != batch[key].shape:
            return None
        assert difference(one[:, -2:], two[:, -2:]) > CLOSE
        return difference(one[:, :-2], two[:, :-2])

    unpatched = earlier(taken.model("eager"))
    if unpatched is None or (
        unpatched > CLOSE and taken.architecture.head not in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    ):
        pytest.skip("its positions see the future by design")
    assert unpatched < CLOSE, f"the unpatched model sees the future: {unpatched}"
    model, worst = taken.model(), {}
    for arm, config in ARMS.items():
        with ga.patch_model(model, config):
            worst[arm] = earlier(model)
    assert all(value < CLOSE for value in worst.values()), worst


def test_a_padded_token_never_changes_a_real_position(taken):
    eager, model, worst, unpatched = taken.model("eager"), taken.model(), {}, {}

    def real_positions(model, batch, other):
        return difference(real(batch, output(model, batch, SEED)), real(batch, output(model, other, SEED)))

    for padding in ("right", "left"):
        batch = taken.inputs(padding)
        other = changed_at(batch, "input_ids", batch["attention_mask"] == 0)
        unpatched[padding] = real_positions(eager, batch, other)
        for arm, config in ARMS.items():
            with ga.patch_model(model, config):
                worst[arm, padding] = real_positions(model, batch, other)
    assert all(value < CLOSE for value in unpatched.values()), f"the unpatched model reads padding: {unpatched}"
    assert all(value < CLOSE for value in worst.values()), worst
