"""What PEFT itself makes of an adapter: which weights it would take, leave or miss, and its scales.

On the meta device, so it costs no memory.  PEFT only warns, or says nothing, where this raises.
"""

import copy
import logging
import warnings
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from megatrain.errors import ExportError

logger = logging.getLogger(__name__)


def attach(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the scale of every LoRA layer, by its path in the PEFT model.

    Raises:
        ExportError: PEFT refuses, or does not take exactly these tensors.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            peft = PeftModel(
                copy.deepcopy(model), LoraConfig.from_peft_type(**config), low_cpu_mem_usage=True
            )
            on_meta = {key: tensor.to("meta") for key, tensor in tensors.items()}
            result = set_peft_model_state_dict(peft, on_meta, low_cpu_mem_usage=True)
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise ExportError(f"PEFT cannot load this adapter: {error}") from error
    for each in said:
        logger.debug("PEFT: %s", each.message)
    check_load(result)
    return {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in peft.named_modules()
        if isinstance(layer, LoraLayer) and "default" in layer.scaling
    }


def check_load(result: Any) -> None:
    """Raise ExportError unless PEFT's load result says that every weight was found and used."""
    missing = sorted(
        key for key in result.missing_keys if "lora_" in key or ".modules_to_save." in key
    )
    if result.unexpected_keys:
        raise ExportError(
            f"PEFT would drop {len(result.unexpected_keys)} weight(s) without a word: "
            f"{', '.join(sorted(result.unexpected_keys)[:5])}; without weights: {missing[:5]}",
            hint="the key, or target_modules and target_parameters, do not fit the model",
        )
    if missing:
        raise ExportError(
            f"{len(missing)} weight(s) that the config asks for are not in the file: "
            f"{', '.join(missing[:5])}",
            hint="target exactly the modules that have weights",
        )
