"""Encoded rows on disk: tokens as int32, sizes and keys beside them, the rest as JSON."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from datasets import Features, List, Value

from megatrain.data.lazy_row import Row, Stopwatch
from megatrain.data.origin import ROW
from megatrain.data.rows import read_batch, to_json
from megatrain.data.steps import RowFunction
from megatrain.errors import DataError
from megatrain.types import IGNORED_LABEL

TOKENS = (
    "input_ids",
    "labels",
    "chosen_input_ids",
    "chosen_labels",
    "rejected_input_ids",
    "rejected_labels",
)
"""Columns of token ids that a template may return."""
KEPT = ("messages", "tools", "user_data", "label")
"""Columns of a standard row that are of use after encoding: to rewards, samplers and KTO."""
EXTRA, KEY = "__extra__", "__key__"
"""Columns with everything else a row has, as JSON, and with a digest of the content."""

ENCODED_FEATURES = Features(
    {
        **{name: List(Value("int32")) for name in TOKENS},
        "length": Value("int64"),
        "num_labels": Value("int64"),
        EXTRA: Value("large_string"),
        KEY: Value("int64"),
        ROW: Value("int64"),
    }
)


class Encode:
    """Encodes one standard row with a template and returns the columns that are stored."""

    def __init__(self, template: Any, *, add_generation_prompt: bool) -> None:
        self._template = template
        self._options = {"add_generation_prompt": add_generation_prompt}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Return the columns, without ROW; None where the template drops the row.

        Raises DataError for a row without tokens, or one longer than the template's max_length.
        """
        row = {name: value for name, value in row.items() if value is not None}
        encoded = self._template.encode(row, **self._options)
        if encoded is None:
            return None
        tokens = {name: np.asarray(encoded[name], dtype=np.int32) for name in TOKENS & encoded.keys()}
        self._check(tokens)
        extra = {
            name: value
            for name, value in {**{key: row[key] for key in KEPT if key in row}, **encoded}.items()
            if name not in ENCODED_FEATURES
        }
        text = to_json(extra) if extra else None
        sizes = _sizes(tokens)
        return {**dict.fromkeys(TOKENS), **tokens, **sizes, EXTRA: text, KEY: _key(tokens, text)}

    def _check(self, tokens: Mapping[str, npt.NDArray[np.int32]]) -> None:
        ids = {name: len(values) for name, values in tokens.items() if name.endswith("input_ids")}
        if not ids or not all(ids.values()):
            raise DataError(
                f"the template returned no tokens: {ids or 'no input_ids'}",
                hint="remove the row with a filter",
            )
        limit = getattr(self._template, "max_length", None)
        if limit is not None and max(ids.values()) > limit:
            raise DataError(
                f"{max(ids.values())} tokens are more than max_length={limit}",
                hint="raise max_length, or choose another truncation_strategy",
            )


class EncodeStep:
    """Encodes each row of a batch."""

    def __init__(self, function: RowFunction) -> None:
        self._function = function

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the encoded columns."""
        columns: dict[str, list[Any]] = {name: [] for name in ENCODED_FEATURES}
        for number, row in read_batch(batch):
            encoded = self._function(number, row)
            if encoded is not None:
                for name, value in {**encoded, ROW: number}.items():
                    columns[name].append(value)
        return columns


class EncodedRows:
    """Encoded rows that lie in Arrow files; only their sizes and keys are in memory."""

    def __init__(self, table: datasets.Dataset) -> None:
        self._table = table
        sizes = table.select_columns(["length", "num_labels", KEY]).with_format("arrow")[:]
        self.lengths: npt.NDArray[np.int64] = sizes["length"].to_numpy()
        self.num_labels: npt.NDArray[np.int64] = sizes["num_labels"].to_numpy()
        self.keys: npt.NDArray[np.int64] = sizes[KEY].to_numpy()

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int, stopwatch: Stopwatch | None = None) -> Row:
        """Return row `index`, not yet read."""
        return Row(
            lambda: public(self._table[index]),
            key=key_text(self.keys[index]),
            num_tokens=int(self.lengths[index]),
            num_labels=int(self.num_labels[index]),
            stopwatch=stopwatch,
        )


class LazyRows:
    """Rows that are encoded each time they are asked for; nothing is stored."""

    def __init__(self, table: datasets.Dataset, encode: Callable[[dict[str, Any]], Any]) -> None:
        self._table, self._encode = table, encode

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int, stopwatch: Stopwatch | None = None) -> Row:
        """Return row `index`, encoded.  Raises DataError for a row that the template drops."""
        return as_row(self._encode(self._table[index]), stopwatch)


def as_row(stored: dict[str, Any], stopwatch: Stopwatch | None = None) -> Row:
    """Return a row whose columns are in memory."""
    return Row(
        lambda: public(stored),
        key=key_text(stored[KEY]),
        num_tokens=int(stored["length"]),
        num_labels=int(stored["num_labels"]),
        stopwatch=stopwatch,
    )


def public(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as a user sees it: no columns of ours, none that it does not have."""
    row: dict[str, Any] = {}
    for name in TOKENS:
        values = stored[name]
        if values is not None:
            row[name] = values.tolist() if isinstance(values, np.ndarray) else values
    row |= {"length": int(stored["length"]), "num_labels": int(stored["num_labels"])}
    if stored[EXTRA] is not None:
        row |= json.loads(stored[EXTRA])
    return row


def read_encoded(batch: Mapping[str, Sequence[Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the content of each encoded row in a batch of columns."""
    names = list(batch)
    for values in zip(*(batch[name] for name in names), strict=True):
        stored = dict(zip(names, values, strict=True))
        yield stored[ROW], public(stored)


def key_text(key: int) -> str:
    """Return a key of 64 bits as 16 hex digits."""
    return f"{int(key) & (1 << 64) - 1:016x}"


def digest(parts: Iterable[bytes]) -> int:
    """Return 64 bits, signed, of a hash of `parts`."""
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(len(part).to_bytes(8, "big"))
        total.update(part)
    return int.from_bytes(total.digest(), "big", signed=True)


def _key(tokens: Mapping[str, npt.NDArray[np.int32]], extra: str | None) -> int:
    parts = [part for name in sorted(tokens) for part in (name.encode(), tokens[name].tobytes())]
    return digest([*parts, (extra or "").encode("utf-8", "surrogatepass")])


def _sizes(tokens: Mapping[str, npt.NDArray[np.int32]]) -> dict[str, int]:
    """Count tokens and predicted labels; without labels every token but the first is one."""
    length = num_labels = 0
    for prefix in ("", "chosen_", "rejected_"):
        ids = tokens.get(f"{prefix}input_ids")
        if ids is None:
            continue
        labels = tokens.get(f"{prefix}labels", ids)
        if len(labels) != len(ids):
            raise DataError(
                f"{prefix}labels must be as long as {prefix}input_ids: {len(labels)} and {len(ids)}",
                hint="mend the template's encode()",
            )
        length += len(ids)
        num_labels += int((labels[1:] != IGNORED_LABEL).sum())
    return {"length": length, "num_labels": num_labels}
