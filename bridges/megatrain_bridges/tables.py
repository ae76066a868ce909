"""Parts of tables of names that families share: Megatron's parameter and Hugging Face's.

A family's table is a list of these, with the prefix of its layers.  `*` stands for a number.
"""

from typing import Any

from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    GatedMLPMapping,
    QKVMapping,
)

LAYER = "decoder.layers.*"
HF_LAYER = "model.layers.*"


def renamed(names: dict[str, str]) -> list[Any]:
    """Return one mapping for each parameter that only has another name."""
    return [AutoMapping(megatron_param=ours, hf_param=theirs) for ours, theirs in names.items()]


def ends(*, embedding: str = "model.embed_tokens", norm: str = "model.norm") -> list[Any]:
    """Return embedding, last norm and head."""
    return renamed(
        {
            "embedding.word_embeddings.weight": f"{embedding}.weight",
            "decoder.final_layernorm.weight": f"{norm}.weight",
            "output_layer.weight": "lm_head.weight",
        }
    )


def attention(*, biases: bool = False) -> list[Any]:
    """Return attention with separate q, k and v, and the norm before it."""
    ours, theirs = f"{LAYER}.self_attention", f"{HF_LAYER}.self_attn"
    kinds = ("weight", "bias") if biases else ("weight",)
    fused: list[Any] = [
        QKVMapping(
            megatron_param=f"{ours}.linear_qkv.{kind}",
            q=f"{theirs}.q_proj.{kind}",
            k=f"{theirs}.k_proj.{kind}",
            v=f"{theirs}.v_proj.{kind}",
        )
        for kind in kinds
    ]
    names = {
        f"{ours}.linear_proj.weight": f"{theirs}.o_proj.weight",
        f"{ours}.linear_qkv.layer_norm_weight": f"{HF_LAYER}.input_layernorm.weight",
    }
    return [*renamed(names), *fused]


def dense_mlp(
    *, norm: str = "post_attention_layernorm", is_gate_separate: bool = True
) -> list[Any]:
    """Return a dense MLP and the norm before it; its gate and up separate, or neither of them."""
    names = {
        f"{LAYER}.mlp.linear_fc1.layer_norm_weight": f"{HF_LAYER}.post_attention_layernorm.weight",
        f"{LAYER}.mlp.linear_fc2.weight": f"{HF_LAYER}.mlp.down_proj.weight",
    }
    result = renamed(names)
    if is_gate_separate:
        result += [gated(f"{LAYER}.mlp.linear_fc1.weight", f"{HF_LAYER}.mlp")]
    return result


def gated(ours: str, theirs: str, gate: str = "gate_proj", up: str = "up_proj") -> Any:
    """Return the mapping of a gate and an up projection to Megatron's first linear."""
    return GatedMLPMapping(
        megatron_param=ours, gate=f"{theirs}.{gate}.weight", up=f"{theirs}.{up}.weight"
    )


def experts(
    block: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> list[Any]:
    """Return router and routed experts, each with three matrices, and the norm before them."""
    theirs = f"{HF_LAYER}.{block}"
    names = {
        f"{LAYER}.pre_mlp_layernorm.weight": f"{HF_LAYER}.post_attention_layernorm.weight",
        f"{LAYER}.mlp.router.weight": f"{theirs}.gate.weight",
        f"{LAYER}.mlp.experts.linear_fc2.weight*": f"{theirs}.experts.*.{down}.weight",
    }
    first = gated(f"{LAYER}.mlp.experts.linear_fc1.weight*", f"{theirs}.experts.*", gate, up)
    return [*renamed(names), first]
