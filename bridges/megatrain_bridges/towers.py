"""The text towers of models that also see: language models under the names of the whole checkpoint.

AutoBridge builds such a model with its vision tower.  Here its language model is built alone, with
the settings of the family's text bridge and the whole model's table of names, less the vision
tower.  With text alone, all three rotary positions of a token are its position.
"""

import copy
from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping
from megatron.bridge.models.qwen.qwen2_bridge import Qwen2Bridge
from megatron.bridge.models.qwen.qwen3_bridge import Qwen3Bridge
from megatron.bridge.models.qwen.qwen3_moe_bridge import Qwen3MoEBridge
from megatron.bridge.models.qwen.qwen35_bridge import Qwen35Bridge, Qwen35MoEBridge
from megatron.bridge.models.qwen_vl.qwen3_vl_bridge import Qwen3VLBridge, Qwen3VLMoEBridge
from megatron.bridge.models.qwen_vl.qwen25_vl_bridge import Qwen25VLBridge
from megatron.bridge.models.qwen_vl.qwen35_vl_bridge import Qwen35VLBridge, Qwen35VLMoEBridge
from megatron.core.models.gpt.gpt_model import GPTModel

PREFIX = "language_model."
"""What Bridge puts before the language model's parameters."""

FAMILIES: dict[str, tuple[type[MegatronModelBridge], type[MegatronModelBridge]]] = {
    "Qwen2_5_VLForConditionalGeneration": (Qwen2Bridge, Qwen25VLBridge),
    "Qwen3VLForConditionalGeneration": (Qwen3Bridge, Qwen3VLBridge),
    "Qwen3VLMoeForConditionalGeneration": (Qwen3MoEBridge, Qwen3VLMoEBridge),
    "Qwen3_5ForConditionalGeneration": (Qwen35Bridge, Qwen35VLBridge),
    "Qwen3_5MoeForConditionalGeneration": (Qwen35MoEBridge, Qwen35VLMoEBridge),
}
"""By architecture: the bridge that sets up the language model, and the one that has the names."""


def tower_of(architecture: str) -> str:
    """Return the name under which an architecture's text tower is registered."""
    return architecture.replace("ForConditionalGeneration", "TextTowerForCausalLM")


def text_config(config: Any, architecture: str) -> Any:
    """Return the configuration of the text tower of a whole model's."""
    text = copy.deepcopy(config.get_text_config())
    text.architectures = [tower_of(architecture)]
    for name in ("tie_word_embeddings", "quantization_config"):
        if getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    if getattr(text, "num_experts", None) and not hasattr(text, "norm_topk_prob"):
        text.norm_topk_prob = True  # Qwen3-VL-MoE has no such setting: it always divides
    return text


def _without_prefix(mapping: MegatronParamMapping[Any]) -> MegatronParamMapping[Any]:
    """Return a copy of a mapping for the language model alone; mappings inside it too."""
    result = copy.copy(mapping)
    for name, value in vars(result).items():
        if isinstance(value, MegatronParamMapping):
            setattr(result, name, _without_prefix(value))
        elif isinstance(value, str) and value.startswith(PREFIX):
            setattr(result, name, value.removeprefix(PREFIX))
    return result


def _register(architecture: str) -> type[MegatronModelBridge]:
    text, whole = FAMILIES[architecture]

    class TextTower(whole):  # type: ignore[misc, valid-type]
        """The language model of a model that also sees."""

        def provider_bridge(self, hf_pretrained: Any) -> Any:
            """Return Megatron's description of the language model."""
            return text.provider_bridge(text(), hf_pretrained)

        def mapping_registry(self) -> MegatronMappingRegistry:
            """Return the table of names."""
            mappings = super().mapping_registry().mappings
            return MegatronMappingRegistry(*map(_without_prefix, mappings))

    TextTower.__name__ = TextTower.__qualname__ = f"TextTowerOf{whole.__name__}"
    return MegatronModelBridge.register_bridge(source=tower_of(architecture), target=GPTModel)(
        TextTower
    )


TOWERS = {architecture: _register(architecture) for architecture in FAMILIES}
"""The bridges that were registered, by architecture."""
