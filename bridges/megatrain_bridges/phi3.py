"""Phi-3 and Phi-4: Llama with q, k and v in one tensor, and gate and up in another."""

from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import ConcatenatedQKVMapping
from megatron.core.models.gpt.gpt_model import GPTModel

from megatrain_bridges.concatenated import ConcatenatedGatedMLPMapping
from megatrain_bridges.settings import set_decoder, set_window
from megatrain_bridges.tables import HF_LAYER, LAYER, dense_mlp, ends, renamed


@MegatronModelBridge.register_bridge(source="Phi3ForCausalLM", target=GPTModel, model_type="phi3")
class Phi3Bridge(MegatronModelBridge):
    """Phi-3, Phi-3.5 mini, Phi-4 and Phi-4-mini; rope type longrope is refused."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        """Return Megatron's description of the model."""
        provider, config = super().provider_bridge(hf_pretrained), hf_pretrained.config
        set_decoder(provider)
        set_window(provider, config)
        provider.rotary_percent = config.rope_parameters.get("partial_rotary_factor", 1.0)
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return the table of names."""
        attention = f"{LAYER}.self_attention"
        names = {
            f"{attention}.linear_proj.weight": f"{HF_LAYER}.self_attn.o_proj.weight",
            f"{attention}.linear_qkv.layer_norm_weight": f"{HF_LAYER}.input_layernorm.weight",
        }
        return MegatronMappingRegistry(
            *ends(),
            *renamed(names),
            *dense_mlp(is_gate_separate=False),
            ConcatenatedQKVMapping(
                megatron_param=f"{attention}.linear_qkv.weight",
                hf_param=f"{HF_LAYER}.self_attn.qkv_proj.weight",
            ),
            ConcatenatedGatedMLPMapping(
                megatron_param=f"{LAYER}.mlp.linear_fc1.weight",
                hf_param=f"{HF_LAYER}.mlp.gate_up_proj.weight",
            ),
        )
