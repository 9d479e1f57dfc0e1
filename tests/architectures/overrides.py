"""What shrinking a configuration by the names of its fields does not find out, by model type."""

from typing import Any

MLA = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 16}
MIXED = ["linear_attention", "full_attention"]
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
TALKS_GEMMA = ["sliding_attention", "full_attention"]

OVERRIDES: dict[str, dict[str, Any]] = {
    "bert-generation": {"is_decoder": True},
    "blt": {
        **{part: {"hidden_size_global": 32} for part in ("encoder_config", "decoder_config")},
        "encoder_hash_byte_group_vocab": 99,
        "patching_threshold": 4.2,
    },
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cosmos3_edge_text": {"rope_parameters": SECTIONS},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"per_layer_config": None, "head_dim": 12},
    "ernie4_5_moe": {"moe_k": 2, "moe_layer_end_index": 1},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "esm": {"vocab_size": 99, "mask_token_id": 4},
    "esmc": {"vocab_size": 99, "mask_token_id": 4},
    "gemma3n_text": {
        "num_hidden_layers": 2,
        "intermediate_size": [40, 40],
        "layer_types": TALKS_GEMMA,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.95, 0.0],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 99,
    },
    "glm4v_moe_text": {"rope_parameters": SECTIONS},
    "glm4v_text": {"rope_parameters": SECTIONS},
    "glm_image_text": {"rope_parameters": SECTIONS},
    "glm_ocr_text": {"rope_parameters": SECTIONS},
    "glm5_next_text": {"index_topk": 8, "index_kpool": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "granitemoehybrid": {**MAMBA2, "layer_types": MIXED, "num_hidden_layers": 2},
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "led": {"attention_window": 6},
    "longformer": {"attention_window": 6},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16},
    "mobilebert": {"embedding_size": 16, "hidden_size": 32, "intra_bottleneck_size": 32},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 16},
    "qwen2_5_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_vl_text": {"rope_parameters": SECTIONS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "feed_forward_size": 40,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
        "hidden_size": 32,
    },
    "sam3_lite_text_text_model": {"num_hidden_layers": 3},
    "xlstm": {"qk_dim_factor": 1.0, "embedding_dim": 32, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
        "mamba_d_state": 8,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
    },
}
