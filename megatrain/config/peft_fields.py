"""The fields of PEFT's LoraConfig that LoraSpec does not have.  A test compares them with PEFT."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatrain.errors import ConfigError

IGNORED = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "runtime_config",
    }
)
"""Fields of PEFT's LoraConfig that say nothing about what is computed."""

REFUSED: Mapping[str, object] = MappingProxyType(
    {
        "fan_in_fan_out": False,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "trainable_token_indices": None,
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "use_dora": False,
        "velora_config": None,
        "alora_invocation_tokens": None,
        "use_qalora": False,
        "qalora_group_size": 16,
        "monteclora_config": None,
        "layer_replication": None,
        "lora_bias": False,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
        "ensure_weight_tying": False,
    }
)
"""Fields of PEFT's LoraConfig (0.21) that must keep PEFT's default."""


def supported(config: Mapping[str, Any], *, known: set[str]) -> dict[str, Any]:
    """Return the options that megatrain knows.

    Raises:
        ConfigError: another one is unknown, or is not at its default.
    """
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type", "LORA"))
    if kind not in (None, "LORA"):
        raise ConfigError(f"only LoRA is supported: peft_type={kind!r}", hint="peft.LoraConfig")
    if unknown := sorted(set(config) - known - IGNORED - set(REFUSED)):
        raise ConfigError(
            f"unknown LoRA option(s): {', '.join(unknown)}",
            hint=f"known: {', '.join(sorted(known))}",
        )
    changed = [name for name in REFUSED if config.get(name, REFUSED[name]) != REFUSED[name]]
    if changed:
        values = ", ".join(f"{name}={config[name]!r}" for name in changed)
        raise ConfigError(f"LoRA option(s) not supported: {values}", hint="leave them out")
    return {name: value for name, value in config.items() if name in known}
