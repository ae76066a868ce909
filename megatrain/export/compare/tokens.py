"""The tokens that two models are compared on: a text file's, or random ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoConfig, AutoTokenizer

from megatrain.errors import CheckpointError, DataError

Datum = dict[str, npt.NDArray[np.int64]]
"""`input_ids` and `labels`, which are the same here: every token is predicted."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
MAX_LENGTH = 512
"""Tokens of a piece that plain text is cut into, and of a conversation that is kept."""
RANDOM_LENGTHS = (23, 64)
"""Of random sequences; one does not divide evenly over anything."""


def read_text(path: Path, model: Path, *, max_length: int = MAX_LENGTH) -> list[Datum]:
    """Return a text's tokens by the tokenizer of a model's folder.

    `*.jsonl` has `messages`, for the chat template, or `text` in each line; anything else is plain
    text, cut into pieces.  Raises DataError, or CheckpointError for a folder without tokenizer.
    """
    tokenizer = _tokenizer(model)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as text: {error}") from error
    if path.suffix == ".jsonl":
        rows = [_encode(tokenizer, row, path, i) for i, row in enumerate(text.splitlines(), 1)]
        pieces = [ids[:max_length] for ids in rows]
    else:
        ids = tokenizer(text)["input_ids"]
        pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    data = [_datum(piece) for piece in pieces if len(piece) > 1]
    if not data:
        raise DataError(f"no sequence of two tokens or more in {path}")
    return data


def _tokenizer(model: Path) -> Any:
    """Return a folder's tokenizer; Transformers makes an empty one where there is no file."""
    hint = "--layers works without a tokenizer"
    if not any((model / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{model} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}", hint=hint
        )
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"cannot read the tokenizer of {model}: {error}", hint=hint
        ) from error


def random_tokens(model: Path, *, seed: int = 0) -> list[Datum]:
    """Return a few sequences of random tokens of a model's vocabulary."""
    config = AutoConfig.from_pretrained(model)
    size = int(config.get_text_config().vocab_size)
    generator = np.random.default_rng(seed)
    return [_datum(generator.integers(0, size, length)) for length in RANDOM_LENGTHS]


def _encode(tokenizer: Any, line: str, path: Path, number: int) -> list[int]:
    if not line.strip():
        return []
    try:
        row = json.loads(line)
        if "messages" in row:
            ids = tokenizer.apply_chat_template(row["messages"], tokenize=True)
            found = ids["input_ids"] if hasattr(ids, "keys") else ids
        else:
            found = tokenizer(row["text"])["input_ids"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: line {number} must have `messages` or `text`: {error!r}"
        ) from error
    return list(found)


def _datum(ids: Any) -> Datum:
    tokens = np.asarray(ids, dtype=np.int64)
    return {"input_ids": tokens, "labels": tokens}
