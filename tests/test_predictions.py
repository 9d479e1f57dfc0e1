"""Predictions over several noisy passes: their mean, their spread, and what they leave behind."""

import pytest
import torch
import transformers as hf

import gumbel_attention as ga
import models
from models import build, inputs, logits

Config = ga.GumbelAttentionConfig


def _classifier(config):
    """A BERT that classifies sequences, patched, and a batch for it."""
    model = build("bert")
    with torch.no_grad():
        classifier = hf.BertForSequenceClassification(hf.BertConfig(num_labels=3, **models.ENCODER))
        classifier.bert.load_state_dict(model.bert.state_dict(), strict=False)
        classifier.classifier.weight.normal_(0.0, 1.0)
    ga.patch_model(classifier, config)
    return classifier.eval(), inputs(classifier, "right")


def _by_hand(model, batch, k):
    """The same from all K probabilities held at once."""
    with torch.no_grad(), ga.patch_of(model).noise(True):
        probabilities = torch.stack([model(**batch).logits.softmax(-1) for _ in range(k)])
    votes = torch.nn.functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).float().mean(0)
    return probabilities.mean(0), probabilities.std(0, correction=0), votes


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("config", [Config(), Config(hard=True), Config(noise="normal", tau=0.5)])
def test_mean_spread_and_votes_are_those_of_the_single_passes(config, k):
    model, batch = _classifier(config)
    torch.manual_seed(3)
    result = ga.sample_predictions(model, batch, k)
    torch.manual_seed(3)
    for got, expected in zip(result, _by_hand(model, batch, k), strict=True):
        assert got.shape == (3, 3)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (result.std.amax(-1) > 1e-3).all() == (k > 1)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(result, ga.sample_predictions(model, batch, k), strict=True))
    assert not torch.equal(result.mean, ga.sample_predictions(model, batch, k).mean)


def test_seeds_give_each_pass_noise_of_its_own_that_belongs_to_the_examples():
    model, batch = _classifier(Config(hard=True))
    patch, seeds = ga.patch_of(model), torch.tensor([5, -9, 2**40])
    with patch.seeds(seeds):
        torch.manual_seed(0)
        result = ga.sample_predictions(model, batch, 5)
        torch.manual_seed(1)
        again = ga.sample_predictions(model, batch, 5)
        with patch.noise(True):
            first_pass = logits(model, batch).softmax(-1)
        once = ga.sample_predictions(model, batch, 1)
    assert (result.std.amax(-1) > 1e-3).all()
    assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))
    torch.testing.assert_close(once.mean, first_pass)
    with patch.seeds(seeds[1:]):
        part = ga.sample_predictions(model, {name: x[1:] for name, x in batch.items()}, 5)
    for got, expected in zip(part, result, strict=True):
        torch.testing.assert_close(got, expected[1:], rtol=1e-4, atol=1e-5)
    with patch.seeds(seeds):
        with pytest.raises(ValueError, match="input_ids"):
            ga.sample_predictions(model, {}, 2)
        assert torch.equal(ga.sample_predictions(model, batch, 5).mean, result.mean)


def test_tokens_are_predicted_one_by_one():
    model = build("llama")
    ga.patch_model(model, Config(hard=True))
    result = ga.sample_predictions(model, inputs(model), 3)
    assert result.mean.shape == result.std.shape == result.votes.shape == (3, 12, models.VOCAB)
    for share in (result.mean, result.votes):
        torch.testing.assert_close(share.sum(-1), torch.ones(3, 12))


def test_modes_and_noise_switches_are_as_before_also_after_an_error():
    model, batch = _classifier([Config(layers=[0]), Config(noise="normal", layers=[1])])
    patch = ga.patch_of(model)
    model.train()
    model.bert.encoder.layer[0].eval()
    patch.noise(False)
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    result = ga.sample_predictions(model, batch, 2)
    assert not result.mean.requires_grad
    with pytest.raises(ValueError, match="input_ids"):
        ga.sample_predictions(model, {}, 2)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert torch.equal(logits(model, batch), logits(model, batch))
    torch.set_rng_state(state)
    assert torch.equal(result.mean, ga.sample_predictions(model, batch, 2).mean)


def test_layers_without_noise_stay_so_and_a_family_switched_to_is_kept():
    mixed, batch = _classifier([Config(layers=[0]), Config(noise="none", layers=[1])])
    torch.manual_seed(0)
    result = ga.sample_predictions(mixed, batch, 4)
    ga.patch_of(mixed).remove()
    ga.patch_model(mixed, Config(layers=[0]))
    torch.manual_seed(0)
    torch.testing.assert_close(ga.sample_predictions(mixed, batch, 4), result, rtol=1e-4, atol=1e-5)
    silent, batch = _classifier(Config(noise="none"))
    patch = ga.patch_of(silent)
    with pytest.raises(ValueError, match="every patched layer has noise='none'"):
        ga.sample_predictions(silent, batch, 2)
    with patch.noise("gumbel"):
        assert (ga.sample_predictions(silent, batch, 3).std > 0).all()


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_a_bad_number_of_passes_is_refused(k, error):
    model, batch = _classifier(Config())
    with pytest.raises(error, match="k must be an integer >= 1"):
        ga.sample_predictions(model, batch, k)


def test_models_without_probabilities_are_refused():
    model = build("bert")
    with pytest.raises(ValueError, match="not patched"):
        ga.sample_predictions(model, inputs(model), 2)
    ga.patch_model(model, Config())
    with pytest.raises(ValueError, match="returns logits of two classes"):
        ga.sample_predictions(model.bert, inputs(model), 2)
    model.classifier = torch.nn.Linear(32, 1)
    with pytest.raises(ValueError, match=r"logits of shape \(3, 12, 1\)"):
        ga.sample_predictions(model, inputs(model), 2)
