"""What an adapter's folder says, before vLLM reads it: some of it vLLM leaves out in silence."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatrain.errors import ConfigError

CONFIG = "adapter_config.json"
UNREAD = ("rank_pattern", "alpha_pattern", "modules_to_save")
"""Fields of PEFT's that vLLM does not look at, though they change what is computed."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What matters of an adapter in PEFT's format."""

    is_stacked: bool
    """Whether factors of all experts are in one tensor, as PEFT writes them."""


def read(name: str, directory: Path, *, max_rank: int | None) -> AdapterFiles:
    """Read an adapter's configuration.

    `max_rank`: what the engine was started for; None: unknown.  Raises ConfigError.
    """
    try:
        config = json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load adapter {name!r} of {directory}: {error}") from error
    rank = int(config.get("r", 0))
    if max_rank is not None and rank > max_rank:
        raise ConfigError(
            f"adapter {name!r} has rank {rank}, and the engine takes {max_rank} at most",
            hint="sampler.max_lora_rank says more",
        )
    if unread := [field for field in UNREAD if config.get(field)]:
        raise ConfigError(
            f"vLLM does not read {', '.join(unread)} of adapter {name!r}: it would compute "
            "something else",
            hint="megatrain convert adapter export --for vllm folds them into the factors",
        )
    return AdapterFiles(bool(config.get("target_parameters")))
