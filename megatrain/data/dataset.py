"""A dataset: rows that are read, mapped, filtered, mixed and encoded, each step cached."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import datasets
import numpy as np
import numpy.typing as npt

from megatrain.config.plugins import build
from megatrain.data.encoded import (
    ENCODED_FEATURES,
    Encode,
    EncodedRows,
    EncodeStep,
    EncodeStored,
    LazyRows,
    as_row,
    read_encoded,
)
from megatrain.data.fingerprint import fingerprint
from megatrain.data.json_files import find_own
from megatrain.data.lazy_row import Row, Stopwatch
from megatrain.data.members import Members
from megatrain.data.meta import DatasetMeta
from megatrain.data.mixing import Stopping, mix
from megatrain.data.origin import Origins
from megatrain.data.rows import ROW_FEATURES, read_batch, read_row
from megatrain.data.source import READ_ERRORS, Source
from megatrain.data.statistics import DatasetStatistics
from megatrain.data.steps import (
    ON_ERROR,
    FilterStep,
    LeftOut,
    MapStep,
    Preprocess,
    PreprocessBatch,
    RowFunction,
)
from megatrain.data.table import Table, log_left_out, run_filter, run_map
from megatrain.errors import ConfigError, DataError, MegatrainError, StateError

WINDOW = 1000
"""Rows of a stream that are held to shuffle them."""


class Dataset:
    """Rows of one data set or several.  Methods change it in place and return it.

    `set_template()` and `map()` may come in any order before `encode()`.  A row that cannot be
    used raises DataError with its file and line; with `on_error="skip"` it is left out, and how
    many were is logged.  With `streaming=True` rows are read, mapped and encoded as they are asked
    for, in order; then it has no length.
    """

    def __init__(
        self,
        dataset_meta: DatasetMeta | str | Path | None = None,
        streaming: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        if on_error not in ON_ERROR:
            raise ConfigError(f"on_error must be one of {ON_ERROR}: got {on_error!r}")
        self.streaming = streaming
        self.template: Any = None
        self._on_error = on_error
        self._origins = Origins()
        self._left_out: list[LeftOut] = []
        self._source = Source(self._origins, self._left_out, streaming=streaming, on_error=on_error)
        self._members = Members()
        self._encoded: EncodedRows | LazyRows | None = None
        self._is_encoded = False
        if dataset_meta is not None:
            self.add_dataset(dataset_meta)

    def add_dataset(self, dataset_meta: DatasetMeta | str | Path) -> Self:
        """Read one more data set; its rows come after those that are there.

        Raises DataError if it cannot be read, StateError after encode().
        """
        self._before_encode("add_dataset")
        if not isinstance(dataset_meta, DatasetMeta):
            dataset_meta = DatasetMeta(dataset_meta)
        self._members.add(dataset_meta, self._source.read(dataset_meta))
        return self

    def set_template(
        self,
        template: Any,
        model_id: str | Path | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Choose the template that encode() uses: a name, a class or an instance.

        A name or a class is built with `model_id` and `options`; one that is in a file or on a hub
        runs with `trust_remote_code` only, here and in map() and filter().  Raises ConfigError.
        """
        self._before_encode("set_template")
        if model_id is not None:
            options = {"model_id": str(model_id), **options}
        self.template = build("template", template, options, trust_remote_code=trust_remote_code)
        return self

    def map(
        self,
        preprocessor: Any,
        load_from_cache_file: bool = True,
        num_proc: int | None = None,
        batched: bool = False,
        dataset_meta: DatasetMeta | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Replace each row by `preprocessor(row)`; None leaves a row out.

        `preprocessor` is a name, a class, an instance or a function; `options` go to a class or a
        function.  With `batched` it takes a list of rows and returns one row or None for each.
        `dataset_meta` limits it to one of several data sets.  Raises DataError, ConfigError.
        """
        self._before_encode("map")
        function = build("preprocessor", preprocessor, options, trust_remote_code=trust_remote_code)
        what = fingerprint("map", function, batched, self._on_error, self._origins.describe())
        left_out = self._recorder("map()")
        of_rows = self._origins, self._on_error, left_out
        step: Any = MapStep(RowFunction(Preprocess(function), *of_rows))
        if batched:
            step = PreprocessBatch(function, *of_rows)

        def mapped(table: Table) -> Table:
            result = run_map(
                table,
                step,
                ROW_FEATURES,
                what=what,
                description="mapping",
                load_from_cache_file=load_from_cache_file,
                num_proc=num_proc,
            )
            log_left_out(left_out, table, result)
            return result

        self._members.change(dataset_meta, mapped)
        return self

    def filter(
        self,
        filter: Any,
        load_from_cache_file: bool = True,
        num_proc: int | None = None,
        dataset_meta: DatasetMeta | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Keep the rows for which `filter(row)` is true, before encode() or after it.

        `filter` is a name, a class, an instance or a function, as for map().
        """
        if isinstance(self._encoded, LazyRows):
            raise StateError("filter() comes before encode(lazy=True): nothing is encoded yet")
        function = build("filter", filter, options, trust_remote_code=trust_remote_code)
        read = read_encoded if self._is_encoded else read_batch
        left_out = self._recorder("filter()")
        step = FilterStep(RowFunction(function, self._origins, self._on_error, left_out), read)
        what = fingerprint("filter", function, self._on_error, self._origins.describe())

        def kept(table: Table) -> Table:
            result = run_filter(
                table,
                step,
                what=what,
                load_from_cache_file=load_from_cache_file,
                num_proc=num_proc,
            )
            log_left_out(left_out, table, result)
            return result

        self._members.change(dataset_meta, kept)
        if self._is_encoded and not self.streaming:
            self._encoded = EncodedRows(self._members.table())
        return self

    def mix_dataset(
        self,
        weights: Sequence[float] | None = None,
        seed: int = 42,
        stopping: Stopping = "first_exhausted",
    ) -> Self:
        """Make one data set of those that were added.

        With `weights`, one each, every row is drawn from a data set with that probability, until
        the first data set has been used up, or until all have (the others start again).  Without
        weights they follow each other whole, as they do where this is not called.
        """
        self._before_encode("mix_dataset")
        members = self._members
        members.merge(mix(members.tables(), members.names(), weights, seed, stopping))
        return self

    def encode(
        self,
        add_generation_prompt: bool = False,
        batched: bool = False,
        load_from_cache_file: bool = True,
        num_proc: int | None = None,
        lazy: bool = False,
    ) -> Self:
        """Turn each row into tokens with the template; messages, user_data and label are kept.

        With `batched` the template gets many rows at once; with `lazy` a row is encoded when it is
        needed, and nothing but its length is kept: a plan over ranks needs all lengths, so every
        rank encodes every row once, in the first epoch, and only its own rows after that.  Raises
        StateError without a template, ConfigError where an option has no effect, DataError for a
        row that cannot be encoded.
        """
        self._before_encode("encode")
        if self.template is None:
            raise StateError("encode() needs a template", hint="call set_template() first")
        encode = Encode(self.template, add_generation_prompt=add_generation_prompt)
        if lazy:
            self._check_lazy(batched, num_proc)
        left_out = self._recorder("encode()")
        function = RowFunction(encode, self._origins, self._on_error, left_out)
        table = self._members.table()
        if lazy:
            self._encoded = LazyRows(table, EncodeStored(function, self._origins))
        else:
            mapped = run_map(
                table,
                EncodeStep(function, encode.batch if batched else None),
                ENCODED_FEATURES,
                what=fingerprint("encode", encode, self._on_error, self._origins.describe()),
                description="encoding",
                load_from_cache_file=load_from_cache_file,
                num_proc=num_proc,
            )
            log_left_out(left_out, table, mapped)
            self._members.merge(mapped)
            self._encoded = None if self.streaming else EncodedRows(mapped)
        self._is_encoded = True
        return self

    @property
    def is_encoded(self) -> bool:
        """Whether encode() was called."""
        return self._is_encoded

    @property
    def has_pairs(self) -> bool:
        """Whether encoded rows are pairs of answers.  Raises StateError as lengths do."""
        return self._sizes().has_pairs

    @property
    def is_read_at_once(self) -> bool:
        """Whether a row is read, or encoded, when it is asked for, rather than when it is used."""
        return self.streaming or not isinstance(self._encoded, EncodedRows)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each encoded row.  Raises StateError where they are not known."""
        return self._sizes().lengths

    @property
    def num_labels(self) -> npt.NDArray[np.int64]:
        """Predicted labels of each encoded row.  Raises StateError where they are not known."""
        return self._sizes().num_labels

    @property
    def fingerprint(self) -> str:
        """Digits that are the same for the same encoded rows, or for the same data and steps."""
        if isinstance(self._encoded, EncodedRows):
            return self._encoded.fingerprint
        return self._members.fingerprint()

    def statistics(self) -> DatasetStatistics:
        """Return the numbers of rows, tokens and labels and the distribution of lengths."""
        rows = self._sizes()
        limit = getattr(self.template, "max_length", None)
        return DatasetStatistics.of(rows.lengths, rows.num_labels, max_length=limit)

    def row(self, index: int, stopwatch: Stopwatch | None = None) -> Row:
        """Return encoded row `index` without reading its tokens yet."""
        if self._encoded is None:
            raise StateError("rows have tokens after encode()", hint="call encode() first")
        return self._encoded.row(index, stopwatch)

    def stream(self, seed: int | None = None, epoch: int = 0) -> Iterator[Row | dict[str, Any]]:
        """Yield a stream's rows in order or, with `seed`, shuffled within a window of 1,000.

        The order depends on `seed` and `epoch` alone.
        """
        table = self._members.table()
        if not isinstance(table, datasets.IterableDataset):
            raise StateError("only a dataset with streaming=True is a stream")
        if seed is not None:
            table = table.shuffle(seed=seed, buffer_size=WINDOW)
            table.set_epoch(epoch)
        for stored in self._named_errors(table):
            yield as_row(stored) if self._is_encoded else read_row(stored)[1]
        for left_out in self._left_out:
            left_out.log()

    def __len__(self) -> int:
        if self.streaming:
            raise TypeError("a dataset with streaming=True has no length before it is read")
        if self._encoded is not None:
            return len(self._encoded)
        return len(self._members)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return row `index` as a new dict; after encode() with its tokens."""
        if self.streaming:
            raise StateError("a stream has no row numbers", hint="iterate over it")
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows")
        index %= len(self)
        if self._is_encoded:
            return dict(self.row(index))
        return read_row(self._members.table()[index])[1]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.streaming:
            yield from (self[index] for index in range(len(self)))
            return
        for row in self.stream():
            yield dict(row)

    def _recorder(self, call: str) -> LeftOut:
        self._left_out.append(LeftOut(call))
        return self._left_out[-1]

    def _sizes(self) -> EncodedRows:
        if not isinstance(self._encoded, EncodedRows):
            raise StateError(
                "lengths are known after encode(), without streaming and lazy",
                hint="call encode() first",
            )
        return self._encoded

    def _before_encode(self, call: str) -> None:
        if self._is_encoded:
            raise StateError(f"{call}() comes before encode()", hint="make a new Dataset")

    def _check_lazy(self, batched: bool, num_proc: int | None) -> None:
        if self.streaming:
            raise ConfigError(
                "encode(lazy=True) has no effect on a stream, which is encoded as it is read",
                hint="leave lazy out",
            )
        if batched or num_proc or self._on_error == "skip":
            raise ConfigError(
                f"encode(lazy=True) encodes one row at a time and can leave none out: got "
                f"{batched=}, {num_proc=}, on_error={self._on_error!r}",
                hint="leave these out, or lazy",
            )

    def _named_errors(self, table: Table) -> Iterator[dict[str, Any]]:
        """Yield stored rows; an error of the reader, which knows no names, is given them."""
        try:
            yield from table
        except MegatrainError:
            raise
        except READ_ERRORS as error:
            raise find_own(error) or DataError(
                f"cannot read {self._origins.names()}: {type(error).__name__}: {error}",
                hint="read it without streaming=True to see which file it is",
            ) from error
