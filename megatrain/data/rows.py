"""How rows are stored between steps: as JSON, so that no key is added, dropped or made null.

Arrow gives every row of a column the same nested keys, which would turn
`{"role": "user", "content": "hi"}` into one with `"tool_calls": None` where another row has tool
calls, and would refuse tool schemas that differ.  So a row that a step returns is one JSON string.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Features, Value

from megatrain.data.origin import ROW
from megatrain.errors import DataError

JSON = "__json__"
"""The column with a whole row as JSON."""

ROW_FEATURES = Features({JSON: Value("large_string"), ROW: Value("int64")})


def read_batch(batch: Mapping[str, Sequence[Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the content of each row in a batch of columns."""
    names = list(batch)
    for values in zip(*(batch[name] for name in names), strict=True):
        yield read_row(dict(zip(names, values, strict=True)))


def read_row(columns: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return the number and the content of a stored row."""
    number = columns.pop(ROW)
    text = columns.pop(JSON, None)
    if text is not None:
        content: dict[str, Any] = json.loads(text)
        return number, content
    return number, {name: _without_nones(value) for name, value in columns.items()}


def to_json(row: Mapping[str, Any]) -> str:
    """Return a row as JSON.  Raises DataError for values that JSON has no form for."""
    try:
        text = json.dumps(row, ensure_ascii=False, default=_plain)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the row has half of a character, {error.object[error.start]!a}, which is no text",
            hint="remove the character",
        ) from error
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a row must be text, numbers, lists and mappings: {error}",
            hint="let the preprocessor return such values only",
        ) from error
    return text


def is_empty(row: Mapping[str, Any]) -> bool:
    """Return whether a row says nothing at all."""
    return all(value is None or value in ("", [], {}) for value in row.values())


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"found {type(value).__name__}")


def _without_nones(value: Any) -> Any:
    """Undo Arrow's filling of nested mappings with keys of other rows."""
    if isinstance(value, dict):
        return {key: _without_nones(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nones(item) for item in value]
    return value
