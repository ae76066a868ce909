"""A dataset whose rows are samples packed up to max_length, borders kept."""

from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatrain.data.dataset import Dataset
from megatrain.data.encoded import EncodedRows, digest, key_text
from megatrain.data.lazy_row import Row, Stopwatch
from megatrain.data.packing import best_fit_decreasing
from megatrain.data.statistics import DatasetStatistics
from megatrain.errors import ConfigError, DataError, StateError
from megatrain.types import IGNORED_LABEL

HARMLESS = ("label", "user_data", "messages", "tools", "text")
"""Columns that no loss takes for a token of a packed row.  A KTO loss asks for the label itself."""


class PackingDataset(Dataset):
    """A Dataset that packs its encoded rows: call pack_dataset() after encode().

    A packed row is {"input_ids", "labels", "position_ids", "lengths", "length", "num_labels"}:
    positions start again at 0 with each sample, `lengths` are the samples' tokens, and a sample's
    first token is never predicted.  Text and user_data are left out; a column
    of numbers, which a loss may take, is refused.  It is put
    together when it is read; until then it is a list of row numbers.
    """

    _packed: "PackedRows | None" = None

    def pack_dataset(self) -> Self:
        """Pack the rows to the template's max_length, best fit, longest first.

        Raises StateError before encode(), ConfigError for a stream, for lazy encoding and without
        max_length, DataError for pairs of answers and columns that a loss may take.
        """
        if not self.is_encoded:
            raise StateError("pack_dataset() comes after encode()", hint="call encode() first")
        if self.streaming or not isinstance(self._encoded, EncodedRows):
            raise ConfigError(
                "packing needs every row's length before the first is read",
                hint="leave streaming=True and lazy=True out",
            )
        limit = getattr(self.template, "max_length", None)
        if limit is None:
            raise ConfigError(
                "packing needs a length to pack to", hint="set_template(..., max_length=4096)"
            )
        self._packed = PackedRows(self._encoded, limit)
        return self

    def statistics(self) -> DatasetStatistics:
        """Return the numbers of the packed rows with their fill rate."""
        rows = self._rows()
        return DatasetStatistics.of(
            rows.lengths,
            rows.num_labels,
            max_length=rows.max_length,
            num_samples=rows.num_samples,
        )

    @property
    def fingerprint(self) -> str:
        """Digits that are the same for the same packed rows."""
        return super().fingerprint if self._packed is None else self._packed.fingerprint

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each packed row."""
        return self._rows().lengths

    @property
    def num_labels(self) -> npt.NDArray[np.int64]:
        """Predicted labels of each packed row."""
        return self._rows().num_labels

    def row(self, index: int, stopwatch: Stopwatch | None = None) -> Row:
        """Return packed row `index` without reading its tokens yet."""
        return self._rows().row(index, stopwatch)

    def __len__(self) -> int:
        return super().__len__() if self._packed is None else len(self._packed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return row `index` as a new dict, put together."""
        if self._packed is None and self.is_encoded:
            self._rows()
        return super().__getitem__(index)

    def filter(self, *args: Any, **options: Any) -> Self:
        """Filter as Dataset.filter() does; before pack_dataset() only."""
        if self._packed is not None:
            raise StateError("filter() comes before pack_dataset()", hint="make a new dataset")
        return super().filter(*args, **options)

    def _rows(self) -> "PackedRows":
        if self._packed is None:
            raise StateError("the rows are not packed yet", hint="call pack_dataset()")
        return self._packed


class PackedRows:
    """Groups of encoded rows, kept as one vector of row numbers and one of where groups start."""

    def __init__(self, rows: EncodedRows, max_length: int) -> None:
        if rows.has_pairs:
            raise DataError(
                "rows with a chosen and a rejected answer cannot be packed",
                hint="use Dataset: the trainer packs pairs by itself",
            )
        lost = [name for name in rows.numbers if name not in HARMLESS]
        if lost:
            raise DataError(
                f"packing leaves out {', '.join(lost)}, which a loss may take",
                hint="use Dataset: the trainer packs by itself; or leave them out with map()",
            )
        groups = best_fit_decreasing(rows.lengths, max_length)
        self.max_length = max_length
        self._samples = rows
        self._order = np.concatenate(groups) if groups else np.zeros(0, dtype=np.int64)
        self._starts = np.cumsum([0, *(len(group) for group in groups)])
        self.lengths = np.add.reduceat(rows.lengths[self._order], self._starts[:-1])
        self.num_labels = np.add.reduceat(rows.num_labels[self._order], self._starts[:-1])

    @property
    def num_samples(self) -> int:
        """Encoded rows in all packed rows."""
        return len(self._order)

    @property
    def fingerprint(self) -> str:
        """Digits of the samples' content, and of which share a row."""
        parts = (self._samples.keys, self._order, self._starts)
        return key_text(digest(part.tobytes() for part in parts))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, index: int, stopwatch: Stopwatch | None = None) -> Row:
        """Return packed row `index`, not yet read."""
        numbers = self._order[self._starts[index] : self._starts[index + 1]]
        return Row(
            lambda: self._join(numbers),
            key=key_text(digest(self._samples.keys[number].tobytes() for number in numbers)),
            num_tokens=int(self.lengths[index]),
            num_labels=int(self.num_labels[index]),
            stopwatch=stopwatch,
        )

    def _join(self, numbers: npt.NDArray[np.int64]) -> dict[str, Any]:
        joined: dict[str, Any] = {"input_ids": [], "labels": [], "position_ids": [], "lengths": []}
        for number in numbers.tolist():
            sample = self._samples.row(number)
            ids = sample["input_ids"]
            joined["input_ids"] += ids
            joined["labels"] += [IGNORED_LABEL, *sample.get("labels", ids)[1:]]
            joined["position_ids"] += range(len(ids))
            joined["lengths"].append(len(ids))
        sizes = {"length": len(joined["input_ids"])}
        count = sum(label != IGNORED_LABEL for label in joined["labels"])
        return {**joined, **sizes, "num_labels": count}
