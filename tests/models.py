"""Tiny models of many architectures with random weights, what to feed them, and what to compare."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import gumbel_attention as ga

torch.set_num_threads(1)
hf.logging.set_verbosity_error()

VOCAB = 99
HEADS = 4
LAYERS = 2
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 40}
ENCODER = {**TOKENS, **SIZE, "max_position_embeddings": 64}
DECODER = {**ENCODER, "num_key_value_heads": 2}
HEAD_DIM = {**DECODER, "head_dim": 8}
ENCODERS = {
    "bert": lambda: hf.BertConfig(**ENCODER),
    "roberta": lambda: hf.RobertaConfig(**ENCODER),
    "electra": lambda: hf.ElectraConfig(embedding_size=16, **ENCODER),
    "distilbert": lambda: hf.DistilBertConfig(
        dim=32, n_layers=LAYERS, n_heads=HEADS, hidden_dim=40, max_position_embeddings=64, **TOKENS
    ),
}
DECODERS = {
    "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=LAYERS, n_head=HEADS, n_positions=64, **TOKENS),
    "llama": lambda: hf.LlamaConfig(**HEAD_DIM),
    "qwen2": lambda: hf.Qwen2Config(**DECODER),
    "qwen3": lambda: hf.Qwen3Config(**HEAD_DIM),
    "mistral": lambda: hf.MistralConfig(sliding_window=5, **HEAD_DIM),
    "gemma": lambda: hf.GemmaConfig(**HEAD_DIM),
    "gemma2": lambda: hf.Gemma2Config(sliding_window=5, **HEAD_DIM),
    "gpt_oss": lambda: hf.GptOssConfig(
        sliding_window=5, num_local_experts=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **HEAD_DIM
    ),
}
SEQ2SEQ = {
    "bart": lambda: hf.BartConfig(
        d_model=32,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **TOKENS,
    ),
    "t5": lambda: hf.T5Config(
        d_model=32, d_kv=8, num_heads=HEADS, num_layers=LAYERS, d_ff=40, decoder_start_token_id=0, **TOKENS
    ),
}
ZOO = {
    **dict.fromkeys(ENCODERS, hf.AutoModelForTokenClassification),
    **dict.fromkeys(DECODERS, hf.AutoModelForCausalLM),
    **dict.fromkeys(SEQ2SEQ, hf.AutoModelForSeq2SeqLM),
}
CONFIGS = {**ENCODERS, **DECODERS, **SEQ2SEQ}
EAGER_ONLY = ("gemma2", "gpt_oss")
NAMES_AND_IMPLEMENTATIONS = [(n, i) for n in ZOO for i in ("eager", "sdpa") if i == "eager" or n not in EAGER_ONLY]

PLAIN = ga.GumbelAttentionConfig(noise="none")
HARD = ga.GumbelAttentionConfig(noise="none", hard=True)
ARMS = {
    "softmax-tau": ga.GumbelAttentionConfig(noise="none", tau=0.5),
    "gumbel-soft": ga.GumbelAttentionConfig(tau=0.5, eval_noise=True),
    "gumbel-st": ga.GumbelAttentionConfig(hard=True, eval_noise=True),
    "det-st": HARD,
}


def build(name: str, implementation: str | None = None) -> Any:
    """The model in eval mode, with weights large enough that attention is far from uniform."""
    return copy.deepcopy(_original(name, implementation or ("eager" if name in EAGER_ONLY else "sdpa")))


@functools.lru_cache
def _original(name: str, implementation: str) -> Any:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = ZOO[name].from_config(CONFIGS[name](), attn_implementation=implementation)
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 or "sinks" in key:
                parameter.normal_(0.0, 0.2)
    return model.eval()


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        for attribute in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def trained(name: str, implementation: str | None = None) -> Any:
    """The model in train mode, without dropout."""
    return without_dropout(build(name, implementation)).train()


def inputs(model: Any, padding: str = "none", length: int = 12) -> dict[str, Tensor]:
    """Three rows of token ids, two of them padded, and seven decoder tokens for an encoder-decoder."""
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(5, VOCAB, (3, length), generator=generator)}
    if padding != "none":
        keep = torch.ones_like(batch["input_ids"])
        keep[0, length - 4 :] = 0
        keep[1, length - 7 :] = 0
        batch["attention_mask"] = keep if padding == "right" else keep.flip(1)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(5, VOCAB, (3, 7), generator=generator)
    return batch


def logits(model: Any, batch: dict[str, Tensor] | None = None, **settings: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**(inputs(model) if batch is None else batch), **settings).logits
    return result


def real(batch: dict[str, Tensor], values: Tensor) -> Tensor:
    """The values at positions that are not padding."""
    if "attention_mask" not in batch or "decoder_input_ids" in batch:
        return values
    return values[batch["attention_mask"].bool()]


def loss_gradients(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of a loss that reads every logit, after ``torch.manual_seed``."""
    model.zero_grad()
    torch.manual_seed(seed)
    model(**inputs(model, "right")).logits.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two sets of gradients, relative to the largest gradient of each parameter's."""
    assert one.keys() == other.keys()
    return max(((one[n] - other[n]).abs().max() / one[n].abs().max().clamp(min=1e-6)).item() for n in one)


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that project queries, whatever the library under test takes for attention."""
    queries = ("q", "q_proj", "q_lin", "query", "c_attn")
    return [m for m in model.modules() if any(isinstance(getattr(m, name, None), nn.Module) for name in queries)]


def fingerprint(model: Any) -> dict[str, Any]:
    """All that a patch could leave behind: modules, attributes, configs by identity and value, keys and weights."""
    modules = dict(model.named_modules())
    named = ((name, getattr(module, "config", None)) for name, module in modules.items())
    configs = {name: config for name, config in named if isinstance(config, hf.PreTrainedConfig)}
    return {
        "modules": {name: (id(module), type(module)) for name, module in modules.items()},
        "attributes": {name: list(vars(module)) for name, module in modules.items()},
        "configs": {name: id(config) for name, config in configs.items()},
        "settings": {name: config.to_dict() for name, config in configs.items()},
        "implementations": {name: config._attn_implementation for name, config in configs.items()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "keys": list(model.state_dict()),
        "modes": {name: module.training for name, module in modules.items()},
    }
