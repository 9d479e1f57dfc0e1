"""Learned temperatures in folders: told apart where names are alike, and refused where two files disagree."""

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.configuration_utils import PretrainedConfig

import gumbel_attention as ga
import saved
from gumbel_attention.integrations.transformers.checkpoints import SUFFIX, TENSORS_FILE, Checkpoint
from models import build, fingerprint

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _told(monkeypatch):
    """Every test starts as a process that has been told how to restore."""
    assert ga.patch_model  # imports the integration, which puts the notice in its place
    monkeypatch.setattr(vars(PretrainedConfig)["gumbel_attention"], "told", True)


def _move(patch, start=0.1):
    """Gives every layer a learned temperature of its own."""
    with torch.no_grad():
        for place, parameter in enumerate(patch.learned_tau_parameters()):
            parameter.fill_(start * (place + 1))


def _swin():
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
    model = hf.SwinModel(hf.SwinConfig(**sizes, window_size=4)).eval()
    patch = ga.patch_model(model, ga.GumbelAttentionConfig(learn_tau="scalar"))
    _move(patch)
    return model, patch


def _same(one, other):
    assert [layer.name for layer in one.layers] == [layer.name for layer in other.layers]
    assert all(torch.equal(a, b) for a, b in zip(one.tau, other.tau, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.meshgrid.*:UserWarning")
def test_layers_whose_names_differ_in_the_order_of_their_numbers_come_back(tmp_path):
    model, patch = _swin()
    names = [layer.name for layer in patch.layers]
    assert "encoder.layers.0.blocks.1.attention" in names
    assert "encoder.layers.1.blocks.0.attention" in names
    model.save_pretrained(tmp_path / "whole")
    _same(patch, ga.patch_of(ga.from_pretrained(hf.SwinModel, tmp_path / "whole")))
    _same(patch, ga.patch_model(hf.SwinModel.from_pretrained(tmp_path / "whole")))
    ga.save_patch(model, tmp_path / "patch")
    fresh, other = _swin()
    other.remove()
    _same(patch, ga.load_patch(fresh, tmp_path / "patch"))


def _learned_tau(folder, names, layers):
    """What is found for the layers where the weights name theirs so, each with its place as its value."""
    tensors = {f"{name}{SUFFIX}": torch.tensor([float(place)]) for place, name in enumerate(names)}
    save_file(tensors, folder / WEIGHTS)
    return [int(log_tau) for log_tau in Checkpoint(folder).learned_tau(layers).values()]


def test_renamed_weights_are_told_by_their_parts_and_the_order_of_their_numbers(tmp_path):
    layers = ["model.vision.stages.0.blocks.1.attention", "model.vision.stages.1.blocks.0.attention"]
    renamed = [name.replace("model.vision", "vision.model") for name in layers]
    assert _learned_tau(tmp_path, renamed, layers) == [0, 1]
    assert _learned_tau(tmp_path, [renamed[1], layers[0]], layers) == [1, 0]
    two_alike = [*renamed, "vision.stages.model.0.blocks.1.attention"]
    one_missing = [renamed[0], "vision.model.stages.1.blocks.1.attention"]
    for names, refused in ((two_alike, layers[0]), (one_missing, layers[1])):
        with pytest.raises(ValueError, match=f"names '{refused}', which matches nothing"):
            _learned_tau(tmp_path, names, layers)


@pytest.mark.parametrize("restore", ["load", "two steps", "load the patch"])
def test_two_files_with_different_learned_temperatures_are_refused(restore, tmp_path):
    model, patch = saved.learned()
    ga.save_patch(model, tmp_path)
    model.save_pretrained(tmp_path)
    attempt = {
        "load": lambda: ga.patch_of(ga.from_pretrained(type(model), tmp_path)),
        "two steps": lambda: ga.patch_model(type(model).from_pretrained(tmp_path)),
        "load the patch": lambda: ga.load_patch(build("bert"), tmp_path),
    }[restore]
    _same(patch, attempt())
    stale = load_file(tmp_path / TENSORS_FILE)
    layer = patch.layers[1].name
    stale[f"{layer}{SUFFIX}"] += 1.0
    save_file(stale, tmp_path / TENSORS_FILE)
    with pytest.raises(ValueError, match=rf"different learned temperatures.*{layer}.*delete {TENSORS_FILE}"):
        attempt()
    (tmp_path / TENSORS_FILE).unlink()
    _same(patch, attempt())


def test_a_stale_patch_does_not_win_over_newer_weights(tmp_path):
    model = build("bert")
    patch = ga.patch_model(model, ga.GumbelAttentionConfig(learn_tau="scalar"))
    ga.save_patch(model, tmp_path)
    _move(patch)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="different"):
        ga.from_pretrained(type(model), tmp_path)
    for file in tmp_path.glob("gumbel_attention.*"):
        file.unlink()
    _same(patch, ga.patch_of(ga.from_pretrained(type(model), tmp_path)))


def test_weights_of_lower_precision_and_weights_named_otherwise_agree_with_the_patch(tmp_path):
    model, patch = saved.learned()
    ga.save_patch(model, tmp_path)
    learned = {key: value for key, value in model.state_dict().items() if key.endswith(SUFFIX)}
    for weights in (
        {key: value.to(torch.bfloat16) for key, value in learned.items()},
        {key.replace(".layer.", ".layer._orig_mod."): value + 1.0 for key, value in learned.items()},
    ):
        save_file(weights, tmp_path / WEIGHTS)
        _same(patch, ga.load_patch(build("bert"), tmp_path))


def _two_places(folder):
    """A model saved with one learned temperature in a folder and with another in a subfolder of it."""
    model, patch = saved.learned()
    _move(patch, 0.5)
    model.save_pretrained(folder / "checkpoint-4")
    _move(patch, 0.1)
    model.save_pretrained(folder)
    return model, patch


def test_two_steps_refuse_the_learned_temperatures_of_another_place(tmp_path):
    model, patch = _two_places(tmp_path)
    _same(patch, ga.patch_model(type(model).from_pretrained(tmp_path)))
    _move(patch, 0.5)
    plain = type(model).from_pretrained(tmp_path, subfolder="checkpoint-4")
    before = fingerprint(plain)
    with pytest.raises(ValueError, match=r"such as a subfolder.*load_patch\(model, path, ...\)"):
        ga.patch_model(plain)
    assert fingerprint(plain) == before
    _same(patch, ga.load_patch(plain, tmp_path, subfolder="checkpoint-4"))
    _same(patch, ga.patch_of(ga.from_pretrained(type(model), tmp_path, subfolder="checkpoint-4")))
    _same(patch, ga.patch_model(type(model).from_pretrained(tmp_path / "checkpoint-4")))


def test_two_steps_refuse_the_learned_temperatures_of_another_variant(tmp_path):
    model, patch = saved.learned()
    model.save_pretrained(tmp_path)
    _move(patch)
    model.save_pretrained(tmp_path, variant="new")
    with pytest.raises(ValueError, match="variant"):
        ga.patch_model(type(model).from_pretrained(tmp_path, variant="new"))
    _same(patch, ga.patch_of(ga.from_pretrained(type(model), tmp_path, variant="new")))


def test_configs_that_do_not_tell_the_learned_temperatures_are_read_as_before(tmp_path):
    model, patch = saved.learned()
    model.save_pretrained(tmp_path)
    assert [list(group["log_tau"]) for group in saved.entry(tmp_path)["groups"]] == [
        [layer.name] for layer in patch.layers
    ]
    saved.change_entry(tmp_path, lambda entry: [group.pop("log_tau") for group in entry["groups"]])
    _same(patch, ga.patch_model(type(model).from_pretrained(tmp_path)))
    _same(patch, ga.patch_of(ga.from_pretrained(type(model), tmp_path)))
    saved.change_entry(tmp_path, lambda entry: entry["groups"][0].update(log_tau={patch.layers[0].name: "warm"}))
    with pytest.raises(ValueError, match="cannot use"):
        ga.patch_model(type(model).from_pretrained(tmp_path))


def test_weights_of_lower_precision_are_those_of_their_config(tmp_path):
    model, patch = saved.learned()
    model.save_pretrained(tmp_path)
    halved = {key: value.to(torch.bfloat16) for key, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(halved, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = ga.patch_model(type(model).from_pretrained(tmp_path))
    assert all(torch.equal(a, b.log().bfloat16().float().exp()) for a, b in zip(loaded.tau, patch.tau, strict=True))


def test_a_config_is_written_without_temperatures_that_are_not_whole_here(tmp_path):
    model, patch = saved.learned()
    (empty, missing) = patch._states
    empty.log_tau.data = torch.empty(0)  # as ZeRO-3 leaves it between the steps
    missing.log_tau = torch.nn.Parameter(torch.empty(1, device="meta"))
    assert not any("log_tau" in group for group in model.config.to_dict()[saved.KEY]["groups"])


def test_a_patch_with_temperatures_that_are_not_whole_here_is_not_written(tmp_path):
    model, patch = saved.learned()
    patch._states[0].log_tau.data = torch.empty(0)
    with pytest.raises(ValueError, match=rf"a part of .* \['{patch.layers[0].name}'\].*GatheredParameters"):
        ga.save_patch(model, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()
