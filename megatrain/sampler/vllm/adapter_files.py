"""What an adapter's folder says, before vLLM reads it: some of it vLLM leaves out in silence."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.errors import ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_HEADER_BYTES = 100 << 20
"""safetensors' own limit."""
UNREAD = ("rank_pattern", "alpha_pattern", "modules_to_save")
"""Fields of PEFT's that vLLM does not look at, though they change what is computed."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What matters of an adapter."""

    rank: int
    has_head: bool
    """Whether the last layer is adapted."""
    is_stacked: bool
    """Whether factors of all experts are in one tensor, as PEFT writes them."""


def read(name: str, directory: Path, *, max_rank: int | None) -> AdapterFiles:
    """Read a folder in PEFT's format.

    `max_rank`: what the engine was started for; None: unknown.  Raises ConfigError.
    """
    try:
        config = json.loads((directory / CONFIG).read_text())
        tensors = _names(directory / WEIGHTS)
    except (OSError, ValueError, struct.error) as error:
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
    return AdapterFiles(
        rank,
        any("lm_head." in tensor or "output_layer." in tensor for tensor in tensors),
        bool(config.get("target_parameters")),
    )


def _names(path: Path) -> list[str]:
    """Return the names of a safetensors file's tensors, from its header."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(size))
    return [name for name in header if name != "__metadata__"]
