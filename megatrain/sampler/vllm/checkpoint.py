"""What the base checkpoint's folder says of texts, as the Transformers engine takes it."""

import json
from pathlib import Path
from typing import Any

from megatrain.errors import ConfigError


def ends_of(model: Path) -> tuple[int, ...]:
    """Return the end-of-sequence tokens of a checkpoint's folder.  Raises ConfigError."""
    config = _read(model / "config.json")
    if config is None:
        raise ConfigError(f"{model} is no checkpoint's folder: it has no config.json")
    text = config.get("text_config") or {}
    for each in (_read(model / "generation_config.json") or {}, text, config):
        found = each.get("eos_token_id")
        if found is not None:
            return (found,) if isinstance(found, int) else tuple(found)
    return ()


def has_tokenizer(model: Path) -> bool:
    """Tell whether there is a tokenizer in a checkpoint's folder."""
    return any(model.glob("*token*"))


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return found
