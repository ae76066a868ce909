"""GLM-4 and GLM-Edge (glm), GLM-4-0414 (glm4): dense models of Zhipu.

Both have biases on q, k and v, gate and up in one tensor, and a rotary embedding that turns
neighbouring entries of the first half of each head.  glm4 has norms behind attention and MLP too.
"""

from typing import Any

from megatron.bridge.models.common import te_layers
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from megatrain_bridges.concatenated import ConcatenatedGatedMLPMapping
from megatrain_bridges.settings import set_decoder
from megatrain_bridges.tables import HF_LAYER, LAYER, attention, dense_mlp, ends, renamed


@MegatronModelBridge.register_bridge(source="GlmForCausalLM", target=GPTModel, model_type="glm")
class GlmBridge(MegatronModelBridge):
    """glm-4-9b-chat-hf, glm-edge-1.5b-chat and glm-edge-4b-chat."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        """Return Megatron's description of the model."""
        provider, config = super().provider_bridge(hf_pretrained), hf_pretrained.config
        set_decoder(provider)
        provider.add_qkv_bias = config.attention_bias
        provider.rotary_interleaved = True
        provider.rotary_percent = config.rope_parameters.get("partial_rotary_factor", 0.5)
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return the table of names."""
        return MegatronMappingRegistry(
            *ends(),
            *attention(biases=True),
            *dense_mlp(is_gate_separate=False),
            ConcatenatedGatedMLPMapping(
                megatron_param=f"{LAYER}.mlp.linear_fc1.weight",
                hf_param=f"{HF_LAYER}.mlp.gate_up_proj.weight",
            ),
        )


@MegatronModelBridge.register_bridge(source="Glm4ForCausalLM", target=GPTModel, model_type="glm4")
class Glm4Bridge(GlmBridge):
    """GLM-4-9B-0414, GLM-4-32B-0414 and GLM-Z1."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        """Return Megatron's description of the model."""
        provider = super().provider_bridge(hf_pretrained)
        provider.transformer_layer_spec = _with_norms_behind
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return the table of names."""
        ours = {
            f"{LAYER}.self_attention.linear_proj.post_layernorm": "post_self_attn_layernorm",
            f"{LAYER}.mlp.linear_fc2.post_layernorm": "post_mlp_layernorm",
        }
        norms = {f"{a}.weight": f"{HF_LAYER}.{b}.weight" for a, b in ours.items()}
        return MegatronMappingRegistry(*super().mapping_registry().mappings, *renamed(norms))


def _with_norms_behind(provider: Any) -> Any:
    """Return the usual layer with a norm behind attention and MLP.

    Looked up when it is called: without Transformer Engine, another class stands there.
    """
    spec = get_gpt_layer_with_transformer_engine_spec()
    row = te_layers.TERowParallelLinearLayerNorm
    spec.submodules.self_attention.submodules.linear_proj = row
    spec.submodules.mlp.keywords["submodules"].linear_fc2 = row
    return spec
