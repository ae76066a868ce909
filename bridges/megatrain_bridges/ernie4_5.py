"""ERNIE 4.5, dense: Llama's names; the rotary embedding turns neighbouring entries."""

from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.core.models.gpt.gpt_model import GPTModel

from megatrain_bridges.settings import set_decoder
from megatrain_bridges.tables import attention, dense_mlp, ends


@MegatronModelBridge.register_bridge(
    source="Ernie4_5ForCausalLM", target=GPTModel, model_type="ernie4_5"
)
class Ernie45Bridge(MegatronModelBridge):
    """ERNIE-4.5-0.3B; its configurations with `use_bias` are refused when tensors are read."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        """Return Megatron's description of the model."""
        provider = super().provider_bridge(hf_pretrained)
        set_decoder(provider)
        provider.rotary_interleaved = True
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return the table of names."""
        return MegatronMappingRegistry(*ends(), *attention(), *dense_mlp())
