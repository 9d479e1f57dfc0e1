"""Tiny configurations for every model type, shrunk from the defaults, and models built from them."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PretrainedConfig

from .catalogue import Architecture
from .overrides import OVERRIDES

VOCAB = 99
LAYERS = 2
HEADS = 4
KEY_VALUE_HEADS = 2
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
STD = 0.2

SIZES: list[
    tuple[str, int]
] = [  # the first pattern that is the whole name gives the size; larger defaults shrink to it
    (r".*vocab_size.*|(.*_)?vocab", VOCAB),
    (r".*(experts_per_tok|moe_topk|moe_top_k|num_selected_experts|num_experts_per_token)|top_k_experts", 2),
    (r"index_topk", 6),
    (r"n_group|topk_group|num_expert_groups?|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r".*(num|n)_?(routed_|local_)?experts|.*num_experts|moe_num_experts", 4),
    (r".*(key_value|kv)_heads|attention_groups|num_query_groups|num_key_value_groups", KEY_VALUE_HEADS),
    (r".*heads|n_head|.*num_head", HEADS),
    (r".*(hidden_layers|_layers|n_layers?|_blocks|num_layers|num_block_records)|.*depth", LAYERS),
    (r"(qk_)?rope_head_dim|qk_rope_head_dim|rotary_dim", 4),
    (r".*head_dim|d_kv|head_size|d_head|.*head_size|kv_channels|attention_key_size|qk_dim|v_dim", 8),
    (r".*lora_rank|.*_rank", 16),
    (r"moe_.*intermediate_size|.*expert.*(intermediate_size|hidden_size|ffn.*size)|.*moe.*ffn.*size", 24),
    (
        r".*intermediate.*(size|dim)|.*ffn.*(size|dim|hidden)|d_ff|d_inner|n_inner|.*mlp.*(size|dim)|hidden_dim|dim_ff",
        40,
    ),
    (r".*(hidden_size|embd|embed_dim|embedding_dim|d_model|model_dim)|dim|emb_dim|embedding_size|width", 32),
    (r".*(max_position|max_seq|max_source|max_target|n_positions|n_ctx|max_len|seq_len|position_embeddings).*", 64),
    (r"(sliding|local|attention|attn)_?(attention)?_?window(_size)?", 5),
    (r".*image_size|.*img_size", 32),
    (r".*patch_size", 8),
]
TYPES = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_types", "attn_type_list")
WITHOUT_DEFAULT = {"head_dim": 8, "num_key_value_heads": HEADS}
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def config(architecture: Architecture) -> Any:
    """A tiny configuration of the architecture."""
    return _shrunk(architecture.cls.config_class, OVERRIDES.get(architecture.name, {}))


def _shrunk(cls: type[Any], given: dict[str, Any]) -> Any:
    """A configuration of this class with the sizes of this file and what is given, nested as the configuration is."""
    default = cls()
    settings = _sizes(default.to_dict())
    parts = [
        key for key in getattr(cls, "sub_configs", {}) if isinstance(getattr(default, key, None), PretrainedConfig)
    ]
    settings |= {key: value for key, value in given.items() if key not in parts}
    settings |= {key: _shrunk(type(getattr(default, key)), given.get(key, {})) for key in parts}
    return cls(**settings)


def _sizes(values: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration changes, given the values of its defaults."""
    settings: dict[str, Any] = {}
    for key, value in values.items():
        size = _size(key)
        if key == "use_cache":
            settings[key] = False
        elif key in TOKEN_IDS:
            settings[key] = TOKEN_IDS[key]
        elif key.endswith("_token_id") and isinstance(value, int) and value >= VOCAB:
            settings[key] = VOCAB - 1
        elif key in ("head_dim", "qk_head_dim") and "qk_rope_head_dim" in values:
            continue  # follows from its parts
        elif key in WITHOUT_DEFAULT and value is None:
            settings[key] = WITHOUT_DEFAULT[key]
        elif key in TYPES and isinstance(value, list | tuple) and value and isinstance(value[0], str):
            settings[key] = list(dict.fromkeys(value))
        elif "dropout" in key or key.endswith(("_pdrop", "layerdrop", "jitter_noise")):
            settings[key] = 0.0 if isinstance(value, float) else value
        elif isinstance(value, int) and not isinstance(value, bool) and size is not None and value > size:
            settings[key] = size
    heads = values.get("num_attention_heads")
    if heads is not None and heads == values.get("num_key_value_heads"):
        settings["num_key_value_heads"] = HEADS
    return settings | _layers(settings)


def _layers(settings: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, and at least as many as elsewhere, where the configuration lists the kinds."""
    kinds = {key: settings[key] for key in TYPES if key in settings}
    if not kinds:
        return {}
    layers = max(LAYERS, *(len(listed) for listed in kinds.values()), 0)
    listed = {key: (value * layers)[:layers] for key, value in kinds.items()}
    return listed | {key: layers for key in COUNTS if key in settings}


def _size(key: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), None)


def build(architecture: Architecture, implementation: str | None = None) -> Any:
    """A tiny model in eval mode, with weights large enough that attention is far from uniform."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = architecture.cls._from_config(config(architecture), attn_implementation=implementation)
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 or "sinks" in key:
                parameter.normal_(0.0, STD)
    return model.eval()
