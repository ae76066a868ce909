"""What makes a tiny model of each architecture: a configuration class and its small sizes.

`make_checkpoint` in `tiny.py` turns an entry into a checkpoint.
"""

from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
DELTA: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SHARED: dict[str, Any] = {**EXPERTS, "shared_expert_intermediate_size": 32}
ROUTED: dict[str, Any] = {
    "head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
LOGIT_CAP = 0.5
"""Published models have 30, which the logits of a tiny one would not feel."""

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_tied": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, **EXPERTS}),
    "deepseek_v3": ("DeepseekV3Config", LATENT),
    "gpt_oss": ("GptOssConfig", {"head_dim": 16, "sliding_window": 8, **LOCAL}),
}
"""Those that most tests use: Transformers' configuration class and what differs from COMMON."""

SEEING: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
}


def _positions(*sections: int) -> dict[str, Any]:
    """Return a rotary embedding in three parts: time, height and width."""
    sections_of = {"mrope_section": list(sections), "mrope_interleaved": True}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **sections_of}}


TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": _positions(2, 3, 3),
            "vision_config": {**SEEING, "fullatt_block_indexes": [0]},
        },
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {
            "text_config": {"head_dim": 16, **_positions(4, 2, 2)},
            "vision_config": {**SEEING, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        {
            "text_config": {"head_dim": 16, **EXPERTS, **_positions(4, 2, 2)},
            "vision_config": {**SEEING, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3_5_vl": ("Qwen3_5Config", {"text_config": DELTA, "vision_config": SEEING}),
    "qwen3_5_moe_vl": (
        "Qwen3_5MoeConfig",
        {"text_config": {**DELTA, **SHARED}, "vision_config": SEEING},
    ),
}
"""Models that also see, of which the language model is trained: text settings, vision settings."""

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **FAMILIES,
    "qwen3_next": ("Qwen3NextConfig", {**DELTA, **SHARED}),
    "qwen3_5": ("Qwen3_5TextConfig", DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**DELTA, **SHARED}),
    "deepseek_v2": ("DeepseekV2Config", {**LATENT, "q_lora_rank": None}),
    "glm4_moe": ("Glm4MoeConfig", ROUTED),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", LATENT),
    "gemma": ("GemmaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "final_logit_softcapping": LOGIT_CAP,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "num_hidden_layers": 6,
            "tie_word_embeddings": True,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 512,
            "final_logit_softcapping": LOGIT_CAP,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": ("OlmoeConfig", {"num_key_value_heads": 4, **EXPERTS}),
    "minimax_m2": (
        "MiniMaxM2Config",
        {"head_dim": 16, "rotary_dim": 8, "partial_rotary_factor": 0.5, **LOCAL},
    ),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 16}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
        },
    ),
    "nemotron": ("NemotronConfig", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "nemotron_h": ("NemotronHConfig", {}),
    "falcon_h1": ("FalconH1Config", {"head_dim": 16}),
    "exaone4": (
        "Exaone4Config",
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 4,
            "tie_word_embeddings": True,
        },
    ),
    "exaone_moe": ("ExaoneMoeConfig", {"sliding_window": 8, **EXPERTS}),
    "glm_moe_dsa": ("GlmMoeDsaConfig", LATENT),
    "hy_v3": ("HYV3Config", {"head_dim": 16, "first_k_dense_replace": 1, **EXPERTS}),
    "deepseek_v4": ("DeepseekV4Config", {}),
    "qwen2_moe": ("Qwen2MoeConfig", SHARED),
    "mixtral": ("MixtralConfig", {"sliding_window": None, **LOCAL}),
    "glm": ("GlmConfig", {"head_dim": 16, "pad_token_id": 0}),
    "glm4": ("Glm4Config", {"head_dim": 16, "pad_token_id": 0}),
    "phi3": ("Phi3Config", {"pad_token_id": 0, "sliding_window": None}),
    **TOWERS,
}
"""Every architecture that AutoBridge, or `bridges/`, has and Transformers can build small."""
