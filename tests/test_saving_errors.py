"""Saved settings that cannot be used: refused with what is wrong, and the model stays as it was."""

import pytest
import torch
from transformers.configuration_utils import PretrainedConfig

import gumbel_attention as ga
import saved
from gumbel_attention.integrations.transformers import saved_settings
from models import build, fingerprint
from saved import SCHEDULED


@pytest.fixture(autouse=True)
def _told(monkeypatch):
    """Every test starts as a process that has been told how to restore."""
    assert ga.patch_model  # imports the integration, which puts the notice in its place
    monkeypatch.setattr(vars(PretrainedConfig)["gumbel_attention"], "told", True)


def test_a_newer_format_is_refused_with_the_keys_it_adds(tmp_path):
    model = build("bert")
    ga.patch_model(model, SCHEDULED)
    model.save_pretrained(tmp_path)

    def newer(entry):
        entry["format_version"], entry["library_version"] = 7, "9.1"
        entry["mood"] = "sunny"
        entry["groups"][0]["config"]["flavour"] = 4

    saved.change_entry(tmp_path, newer)
    plain = type(model).from_pretrained(tmp_path)
    before = fingerprint(plain)
    for attempt in (lambda: ga.from_pretrained(type(model), tmp_path), lambda: ga.patch_model(plain)):
        with pytest.raises(ValueError, match=r"format 7, written by gumbel_attention 9\.1.*\['flavour', 'mood'\]"):
            attempt()
    assert fingerprint(plain) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry["groups"][0]["config"].update(noise_version=2), "noise_version 2"),
        (lambda entry: entry["groups"][0]["config"].update(noise="pink"), "noise must be one of"),
        (lambda entry: entry["groups"][0].update(tau=-1.0), "tau must be"),
        (lambda entry: entry["groups"][0].pop("tau"), "tau"),
        (lambda entry: entry["groups"][0]["layers"].append("bert.nowhere"), "'bert.nowhere', which matches nothing"),
        (lambda entry: entry["groups"][0].update(extra=1), r"\['extra'\]"),
        (lambda entry: entry.update(groups=[]), "name no layer"),
        (lambda entry: entry.update(groups="all"), "cannot use"),
        (lambda entry: entry.pop("groups"), "groups"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(change, message, tmp_path):
    model = build("bert")
    ga.patch_model(model, SCHEDULED)
    model.save_pretrained(tmp_path)
    saved.change_entry(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        ga.from_pretrained(type(model), tmp_path)


def test_missing_or_foreign_learned_temperatures_are_refused_and_nothing_changes(tmp_path):
    model, _ = saved.learned()
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    before = fingerprint(plain)
    wrong = {key: value[:1] if "log_tau" in key else value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=wrong)
    with pytest.raises(ValueError, match=r"shape \(1,\), expected \(4,\)"):
        ga.patch_model(plain)
    none = {key: value for key, value in model.state_dict().items() if "log_tau" not in key}
    model.save_pretrained(tmp_path, state_dict=none)
    with pytest.raises(ValueError, match=r"no learned temperature.*from_pretrained\(model_class, folder\)"):
        ga.patch_model(plain)
    assert fingerprint(plain) == before


def test_what_is_not_there_is_said(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="carries no Gumbel attention settings"):
        ga.from_pretrained(type(model), tmp_path)
    with pytest.raises(ValueError, match="carries no Gumbel attention settings"):
        ga.patch_model(model)
    with pytest.raises(OSError, match="nowhere"):
        ga.from_pretrained(type(model), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not patched"):
        ga.save_patch(model, tmp_path)
    ga.patch_model(model, SCHEDULED)
    model.save_pretrained(tmp_path)
    for attempt in (lambda: ga.patch_model(model), lambda: ga.load_patch(model, tmp_path)):
        with pytest.raises(ValueError, match="patched already"):
            attempt()
    with pytest.raises(TypeError, match="PreTrainedModel"):
        ga.load_patch(torch.nn.Linear(2, 2), tmp_path)


def test_two_files_that_disagree_are_refused(tmp_path):
    model = build("bert")
    patch = ga.patch_model(model, SCHEDULED)
    model.save_pretrained(tmp_path)
    ga.save_patch(model, tmp_path)
    ga.from_pretrained(type(model), tmp_path)
    patch.set_tau(0.1)
    ga.save_patch(model, tmp_path)
    with pytest.raises(ValueError, match="different things"):
        ga.from_pretrained(type(model), tmp_path)


@pytest.mark.parametrize(
    ("saved", "present", "expected"),
    [
        (["a.b"], ["a.b", "x.a.b"], ["a.b"]),
        (["m.l.0.att", "m.l.1.att"], ["l.1.att", "l.0.att"], ["l.0.att", "l.1.att"]),
        (["l.0.att"], ["m.l.0.att", "m.cl.0.att"], ["m.l.0.att"]),
    ],
)
def test_names_are_matched_up_to_a_prefix(saved, present, expected):
    assert list(saved_settings.match_names(saved, present, "it").values()) == expected


@pytest.mark.parametrize(
    ("saved", "present"),
    [
        (["l.1.att"], ["l.0.att"]),
        (["l.0.att"], ["a.l.0.att", "b.l.0.att"]),
        (["a.l.0.att", "l.0.att"], ["l.0.att"]),
        (["decoder.0"], ["encoder.0"]),
    ],
)
def test_names_that_are_missing_or_ambiguous_are_refused(saved, present):
    with pytest.raises(ValueError, match="it names"):
        saved_settings.match_names(saved, present, "it")
