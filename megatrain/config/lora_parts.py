"""LoRA by part of a model - attention, MLP, unembedding - by the names of its layers.  No torch."""

from typing import Any

from megatrain.errors import ConfigError

ATTENTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "query_key_value",
    "in_proj_qkvz",
    "in_proj_ba",
    "in_proj_qkv",
    "in_proj_z",
    "in_proj_b",
    "in_proj_a",
    r"linear_attn\.out_proj",
    r"(?:self_attn|self_attention|attention)\.dense",
)
"""Endings of linear layers of attention, softmax or linear."""
MLP = (
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "dense_h_to_4h",
    "dense_4h_to_h",
    r"experts\.\d+\.w[123]",
    r"feed_forward\.w[123]",
)
"""Endings of linear layers of MLPs and experts; routers and gates of shared experts are none."""
UNEMBEDDING = ("lm_head", r"output_layer")
"""Names of the last linear layer."""


def targets(*, attn: bool = True, mlp: bool = True, unembed: bool = True) -> dict[str, Any]:
    """Return LoraSpec's `target_modules` for these parts: one regular expression of whole names.

    Raises ConfigError if no part is left.
    """
    parts = [ATTENTION] * attn + [MLP] * mlp + [UNEMBEDDING] * unembed
    endings = [ending for part in parts for ending in part]
    if not endings:
        raise ConfigError(
            "an adapter needs a part to train: train_attn, train_mlp and train_unembed are False"
        )
    return {"target_modules": rf"(?:.*\.)?(?:{'|'.join(endings)})"}
