"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention with biases, experts, and a gated shared expert."""

from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import ReplicatedMapping
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from megatrain_bridges.settings import set_decoder, set_experts
from megatrain_bridges.tables import (
    HF_LAYER,
    LAYER,
    attention,
    dense_mlp,
    ends,
    experts,
    gated,
    renamed,
)


def _block_spec(provider: Any, vp_stage: int | None = None) -> Any:
    return get_gpt_decoder_block_spec(provider, use_transformer_engine=True, vp_stage=vp_stage)


@MegatronModelBridge.register_bridge(
    source="Qwen2MoeForCausalLM", target=GPTModel, model_type="qwen2_moe"
)
class Qwen2MoeBridge(MegatronModelBridge):
    """Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        """Return Megatron's description of the model."""
        provider, config = super().provider_bridge(hf_pretrained), hf_pretrained.config
        set_decoder(provider)
        set_experts(provider, is_normalized=config.norm_topk_prob)
        provider.add_qkv_bias = config.qkv_bias
        provider.transformer_layer_spec = _block_spec
        provider.moe_layer_freq = [
            int(i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0)
            for i in range(config.num_hidden_layers)
        ]
        provider.moe_shared_expert_gate = True
        provider.moe_shared_expert_intermediate_size = config.shared_expert_intermediate_size
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return the table of names."""
        ours, theirs = f"{LAYER}.mlp.shared_experts", f"{HF_LAYER}.mlp.shared_expert"
        shared = renamed(
            {
                f"{ours}.linear_fc2.weight": f"{theirs}.down_proj.weight",
            }
        )
        gate = ReplicatedMapping(
            megatron_param=f"{ours}.gate_weight",
            hf_param=f"{HF_LAYER}.mlp.shared_expert_gate.weight",
        )
        return MegatronMappingRegistry(
            *ends(),
            *attention(biases=True),
            *dense_mlp(),
            *experts("mlp"),
            *shared,
            gate,
            gated(f"{ours}.linear_fc1.weight", theirs),
        )
