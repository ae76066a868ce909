"""Mixtral: Mistral's attention, and experts that are called w1 (gate), w3 (up) and w2 (down)."""

from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.core.models.gpt.gpt_model import GPTModel

from megatrain_bridges.settings import set_decoder, set_experts, set_window
from megatrain_bridges.tables import attention, ends, experts


@MegatronModelBridge.register_bridge(
    source="MixtralForCausalLM", target=GPTModel, model_type="mixtral"
)
class MixtralBridge(MegatronModelBridge):
    """Mixtral 8x7B and 8x22B."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        """Return Megatron's description of the model."""
        provider = super().provider_bridge(hf_pretrained)
        set_decoder(provider)
        set_experts(provider, is_normalized=True)
        set_window(provider, hf_pretrained.config)
        provider.moe_ffn_hidden_size = hf_pretrained.config.intermediate_size
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return the table of names."""
        block = experts("block_sparse_moe", gate="w1", up="w3", down="w2")
        return MegatronMappingRegistry(*ends(), *attention(), *block)
