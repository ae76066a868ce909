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
from megatrain.data.origin import ROW, Origins
from megatrain.data.pair_row import PairRow
from megatrain.data.rows import is_empty, read_batch, read_row, to_json
from megatrain.data.steps import ROW_ERRORS, RowFunction
from megatrain.errors import DataError, MegatrainError
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
CONSUMED = ("text", "chosen", "rejected")
"""Columns of a standard row that nothing needs once they are tokens; messages are a sampler's and
a reward's prompt."""
CHOSEN = ("chosen_length", "chosen_num_labels")
"""Columns with the sizes of a pair's first side; null for a row that is no pair."""
EXTRA, KEY = "__extra__", "__key__"
"""Columns with everything else a row has, as JSON, and with a digest of the content."""
NUMBERS = "__numbers__"
"""The column with the names of what is made of numbers in EXTRA, which a loss may take, one a
line."""

SIZES = ("length", "num_labels", *CHOSEN, KEY, NUMBERS)
"""Columns that say of a row what is asked before it is read."""

ENCODED_FEATURES = Features(
    {
        **{name: List(Value("int32")) for name in TOKENS},
        "length": Value("int64"),
        "num_labels": Value("int64"),
        **{name: Value("int64") for name in CHOSEN},
        EXTRA: Value("large_string"),
        NUMBERS: Value("string"),
        KEY: Value("int64"),
        ROW: Value("int64"),
    }
)


class Encode:
    """Encodes standard rows with a template into the columns that are stored."""

    def __init__(self, template: Any, *, add_generation_prompt: bool) -> None:
        self._template = template
        self._options = {"add_generation_prompt": add_generation_prompt}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Return the columns, without ROW; None where the template drops the row.

        Raises DataError for a row without tokens, or one longer than the template's max_length.
        """
        row = _present(row)
        return self._columns(row, self._template.encode(row, **self._options))

    def batch(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
        """Return the same for several rows at once, by the template's batch_encode()."""
        rows = [_present(row) for row in rows]
        results = self._template.batch_encode(rows, **self._options)
        return [self._columns(row, done) for row, done in zip(rows, results, strict=True)]

    def _columns(
        self, row: Mapping[str, Any], encoded: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        if encoded is None:
            return None
        tokens = {
            name: np.asarray(encoded[name], dtype=np.int32) for name in TOKENS if name in encoded
        }
        self._check(tokens)
        extra = {
            name: value
            for name, value in {**row, **encoded}.items()
            if name not in ENCODED_FEATURES and name not in CONSUMED
        }
        text = to_json(extra) if extra else None
        sizes = _sizes(tokens)
        numbers = "\n".join(sorted(name for name in extra if _is_numbers(extra[name])))
        own = {EXTRA: text, NUMBERS: numbers, KEY: _key(tokens, text)}
        return {**dict.fromkeys(TOKENS), **tokens, **sizes, **own}

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
    """Encodes each row of a batch, or, with `whole`, the batch at once."""

    def __init__(
        self, function: RowFunction, whole: Callable[..., list[dict[str, Any] | None]] | None
    ) -> None:
        self._function, self._whole = function, whole

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the encoded columns."""
        rows = list(read_batch(batch))
        columns: dict[str, list[Any]] = {name: [] for name in ENCODED_FEATURES}
        for (number, _), encoded in zip(rows, self._encode(rows), strict=True):
            if encoded is not None:
                for name, value in {**encoded, ROW: number}.items():
                    columns[name].append(value)
        return columns

    def _encode(self, rows: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any] | None]:
        if self._whole is not None and not any(is_empty(row) for _, row in rows):
            try:
                return self._whole([row for _, row in rows])
            except (MegatrainError, *ROW_ERRORS):
                pass  # one row at a time, the one with the error is named
        return [self._function(number, row) for number, row in rows]


class EncodedRows:
    """Encoded rows that lie in Arrow files; only their sizes and keys are in memory."""

    def __init__(self, table: datasets.Dataset) -> None:
        self._table = table
        sizes = table.select_columns(list(SIZES)).with_format("arrow")[:]
        self.lengths: npt.NDArray[np.int64] = sizes["length"].to_numpy()
        self.num_labels: npt.NDArray[np.int64] = sizes["num_labels"].to_numpy()
        self.keys: npt.NDArray[np.int64] = sizes[KEY].to_numpy()
        self._chosen = [sizes[name].fill_null(-1).to_numpy() for name in CHOSEN]
        self.has_pairs = bool((self._chosen[0] >= 0).any())
        texts = sizes[NUMBERS].combine_chunks().dictionary_encode()
        self._kinds = [_names(text) for text in texts.dictionary.to_pylist()]
        self._kind: npt.NDArray[np.int32] = texts.indices.to_numpy()
        self.numbers = sorted({name for names in self._kinds for name in names})
        """Columns made of numbers, beside the tokens, in any of the rows."""

    def __len__(self) -> int:
        return len(self._table)

    @property
    def fingerprint(self) -> str:
        """Digits of the rows' content, in their order."""
        return key_text(digest([self.keys.tobytes()]))

    def row(self, index: int, stopwatch: Stopwatch | None = None) -> Row:
        """Return row `index`, not yet read."""
        sizes = {"length": self.lengths[index], "num_labels": self.num_labels[index]}
        chosen = (int(self._chosen[0][index]), int(self._chosen[1][index]))
        return _row(
            lambda: public(self._table[index]),
            {**sizes, KEY: self.keys[index]},
            chosen if chosen[0] >= 0 else None,
            self._kinds[self._kind[index]],
            stopwatch,
        )


class EncodeStored:
    """Encodes one stored row when it is asked for."""

    def __init__(self, function: RowFunction, origins: Origins) -> None:
        self._function, self._origins = function, origins

    def __call__(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Return the row's columns.  Raises DataError for a row that the template leaves out."""
        number, row = read_row(stored)
        encoded: dict[str, Any] | None = self._function(number, row)
        if encoded is None:
            raise DataError(
                f"{self._origins.where(number)}: the template leaves this row out, which is not "
                "possible once rows are numbered",
                hint="call encode() without lazy=True",
            )
        return encoded


class LazyRows:
    """Rows that are encoded when they are needed; nothing is stored but their sizes.

    A row's length is known by encoding it alone, so the first time it is encoded when it is asked
    for, and from then on when it is read.
    """

    def __init__(self, table: datasets.Dataset, encode: Callable[[dict[str, Any]], Any]) -> None:
        self._table, self._encode = table, encode
        self._sizes: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int, stopwatch: Stopwatch | None = None) -> Row:
        """Return row `index`.  Raises DataError for a row that the template drops."""
        if index in self._sizes:
            return as_row(self._sizes[index], stopwatch, read=lambda: self._stored(index))
        stored = self._stored(index)
        self._sizes[index] = {name: stored[name] for name in SIZES}
        return as_row(stored, stopwatch)

    def _stored(self, index: int) -> dict[str, Any]:
        encoded: dict[str, Any] = self._encode(self._table[index])
        return encoded


def as_row(
    stored: dict[str, Any],
    stopwatch: Stopwatch | None = None,
    read: Callable[[], dict[str, Any]] | None = None,
) -> Row:
    """Return a row whose columns are in memory, or of which SIZES are and `read` gets them all."""
    chosen = None
    if stored[CHOSEN[0]] is not None:
        chosen = (int(stored[CHOSEN[0]]), int(stored[CHOSEN[1]]))
    whole = read or (lambda: stored)
    return _row(lambda: public(whole()), stored, chosen, _names(stored[NUMBERS]), stopwatch)


def _row(
    read: Callable[[], dict[str, Any]],
    sizes: Mapping[str, Any],
    chosen: tuple[int, int] | None,
    numbers: Sequence[str],
    stopwatch: Stopwatch | None,
) -> Row:
    options: dict[str, Any] = {
        "key": key_text(sizes[KEY]),
        "num_tokens": int(sizes["length"]),
        "num_labels": int(sizes["num_labels"]),
        "numbers": numbers,
        "stopwatch": stopwatch,
    }
    return Row(read, **options) if chosen is None else PairRow(read, chosen=chosen, **options)


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


def _names(numbers: str) -> list[str]:
    """Return the names in a value of NUMBERS."""
    return [name for name in numbers.split("\n") if name]


def _is_numbers(value: Any) -> bool:
    """Return whether a value is a number or lists of numbers."""
    if isinstance(value, list | tuple | np.ndarray):
        return len(value) > 0 and all(_is_numbers(item) for item in value)
    return isinstance(value, int | float | np.number | np.bool)


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out columns that this row does not have, and others do."""
    return {name: value for name, value in row.items() if value is not None}


def _key(tokens: Mapping[str, npt.NDArray[np.int32]], extra: str | None) -> int:
    parts = [part for name in sorted(tokens) for part in (name.encode(), tokens[name].tobytes())]
    return digest([*parts, (extra or "").encode("utf-8", "surrogatepass")])


def _sizes(tokens: Mapping[str, npt.NDArray[np.int32]]) -> dict[str, int | None]:
    """Count tokens and predicted labels; without labels every token but the first is one."""
    length = num_labels = 0
    chosen: dict[str, int | None] = dict.fromkeys(CHOSEN)
    for prefix in ("", "chosen_", "rejected_"):
        ids = tokens.get(f"{prefix}input_ids")
        if ids is None:
            continue
        labels = tokens.get(f"{prefix}labels", ids)
        if len(labels) != len(ids):
            raise DataError(
                f"{prefix}labels must be as long as {prefix}input_ids: {len(labels)} and "
                f"{len(ids)}",
                hint="mend the template's encode()",
            )
        length += len(ids)
        num_labels += int((labels[1:] != IGNORED_LABEL).sum())
        if prefix == "chosen_":
            chosen = {CHOSEN[0]: length, CHOSEN[1]: num_labels}
    return {"length": length, "num_labels": num_labels, **chosen}
