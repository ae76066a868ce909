"""What an adapter's folder says, before vLLM reads it: some of it vLLM leaves out in silence."""

import json
from pathlib import Path

from megatrain.errors import ConfigError

CONFIG = "adapter_config.json"
UNREAD = ("rank_pattern", "alpha_pattern", "modules_to_save")
"""Fields of PEFT's that vLLM does not look at, though they change what is computed."""


def is_stacked(name: str, directory: Path, *, max_rank: int | None) -> bool:
    """Tell whether an adapter has factors of all experts in one tensor, as PEFT writes them.

    `max_rank`: what the engine was started for; None: unknown.  Raises ConfigError for an adapter
    that cannot be read, or that vLLM would read wrongly.
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
    return bool(config.get("target_parameters"))
