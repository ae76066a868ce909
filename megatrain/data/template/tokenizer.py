"""A checkpoint's tokenizer, and the tokens at which its model stops."""

import json
from pathlib import Path
from typing import Any

import transformers

from megatrain.checkpoint.locate import TOKENIZER_FILES, locate
from megatrain.errors import CheckpointError, ConfigError

FILES = ("tokenizer.json", "tokenizer_config.json")


def load_tokenizer(model_id: str) -> Any:
    """Return the fast tokenizer of `model_id`: a folder that has one, or what locate() takes."""
    folder = Path(model_id).expanduser()
    if not any((folder / name).is_file() for name in FILES):
        folder = locate(model_id, TOKENIZER_FILES)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no tokenizer in {folder}: {error}") from error


def check_fast(tokenizer: Any) -> None:
    """Raise ConfigError unless the tokenizer tells which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for",
            hint="a fast tokenizer is needed: one with a tokenizer.json",
        )


def special_tokens(tokenizer: Any) -> list[str]:
    """Return the texts of all special tokens, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return sorted(texts, key=lambda text: (-len(text), text))


def end_tokens(tokenizer: Any) -> list[str]:
    """Return the tokens at which the model stops: the tokenizer's and generation_config's."""
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    known = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    ids = known if isinstance(known, list) else [known]
    texts = [tokenizer.convert_ids_to_tokens(token) for token in ids if token is not None]
    return list(dict.fromkeys([*filter(None, [tokenizer.eos_token]), *texts]))
