"""What a client may know of a base checkpoint, read from its folder.  No torch, no transformers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.config.service import ServedModel
from megatrain.errors import CheckpointError

LONGEST = 1 << 20
"""Tokens, where a checkpoint names no longest context."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base checkpoint, and how it is called."""

    name: str
    folder: Path
    arch: str
    vocab_size: int
    max_context_length: int
    """Tokens of a prompt with what follows it."""
    tokenizer_id: str
    is_moe: bool

    @classmethod
    def read(cls, served: ServedModel, folder: Path) -> "BaseModel":
        """Return what config.json says.  Raises CheckpointError."""
        try:
            config = json.loads((folder / "config.json").read_text())
            text = config.get("text_config", config)
            vocab_size = int(text["vocab_size"])
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{folder} holds no config.json with a vocab_size: {error}",
                hint="give the folder of a Hugging Face checkpoint",
            ) from error
        longest = int(text.get("max_position_embeddings") or LONGEST)
        asked = served.max_context_length
        return cls(
            name=served.name,
            folder=folder,
            arch=str((config.get("architectures") or [text.get("model_type", "unknown")])[0]),
            vocab_size=vocab_size,
            max_context_length=longest if asked is None else min(asked, longest),
            tokenizer_id=served.tokenizer or served.name,
            is_moe=_is_moe(text),
        )


def _is_moe(text: dict[str, Any]) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(text.get(name) for name in names)
