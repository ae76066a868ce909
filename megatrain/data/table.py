"""What is done to `datasets`' tables: steps that are cached under names that we choose."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock

from megatrain.data.fingerprint import fingerprint
from megatrain.data.origin import ROW
from megatrain.data.steps import LeftOut
from megatrain.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

type Table = datasets.Dataset | datasets.IterableDataset

STREAM_BATCH = 64
"""Rows that a step takes at once from a stream, as its first batch waits for them."""


def run_map(  # noqa: PLR0913 - a step and how it is run
    table: Table,
    step: Callable[..., Any],
    features: datasets.Features,
    *,
    what: str,
    description: str,
    with_indices: bool = False,
    load_from_cache_file: bool = True,
    num_proc: int | None = None,
) -> Table:
    """Return what `step` makes of `table`, batch by batch; rows may be fewer than before.

    `what` says the step and its options: with the table's own fingerprint it names the cache file.
    """
    if isinstance(table, datasets.IterableDataset):
        _refuse_processes(num_proc)
        return table.map(
            step,
            batched=True,
            batch_size=STREAM_BATCH,
            with_indices=with_indices,
            remove_columns=table.column_names,
            features=features,
        )
    name = fingerprint(table._fingerprint, what)
    with _one_process_at_a_time(table, name) if load_from_cache_file else nullcontext():
        return table.map(
            step,
            batched=True,
            with_indices=with_indices,
            remove_columns=table.column_names,
            features=features,
            load_from_cache_file=load_from_cache_file,
            num_proc=num_proc,
            new_fingerprint=name,
            desc=description,
        )


def run_filter(
    table: Table,
    step: Callable[..., Any],
    *,
    what: str,
    load_from_cache_file: bool = True,
    num_proc: int | None = None,
) -> Table:
    """Return the rows of `table` for which `step` (a list of bools for a batch) says True."""
    if isinstance(table, datasets.IterableDataset):
        _refuse_processes(num_proc)
        return table.filter(step, batched=True, batch_size=STREAM_BATCH)
    name = fingerprint(table._fingerprint, what)
    with _one_process_at_a_time(table, name) if load_from_cache_file else nullcontext():
        return table.filter(
            step,
            batched=True,
            load_from_cache_file=load_from_cache_file,
            num_proc=num_proc,
            new_fingerprint=name,
            desc="filtering",
        )


def log_left_out(left_out: LeftOut, before: Table, after: Table) -> None:
    """Warn of rows that a step left out.  Raises DataError if none is left."""
    if isinstance(before, datasets.IterableDataset):
        return
    left_out.log(len(before) - len(after), len(before))
    if not len(after):
        raise DataError(
            f"{left_out.call} left out all of {len(before)} rows", hint="check its options"
        )


def with_columns(table: Table) -> Table:
    """Return a stream whose columns are known: its first rows are read, if they are not."""
    if isinstance(table, datasets.IterableDataset) and table.features is None:
        return table._resolve_features()
    return table


def add_row_numbers(table: Table, start: int) -> Table:
    """Return the table with a column ROW: `start` + 1, `start` + 2, ..."""
    if isinstance(table, datasets.IterableDataset):
        features = datasets.Features({**table.features, ROW: datasets.Value("int64")})
        return table.map(
            lambda row, index: {**row, ROW: start + index + 1}, with_indices=True, features=features
        )
    numbers = np.arange(start + 1, start + 1 + len(table), dtype=np.int64)
    return table.add_column(
        ROW, numbers, new_fingerprint=fingerprint(table._fingerprint, "numbers", start)
    )


def _one_process_at_a_time(table: datasets.Dataset, name: str) -> AbstractContextManager[Any]:
    """Let the first of this machine's ranks do the work and the others find its cache file."""
    if not table.cache_files or not datasets.is_caching_enabled():
        return nullcontext()
    return FileLock(Path(table.cache_files[0]["filename"]).parent / f"{name}.lock")


def _refuse_processes(num_proc: int | None) -> None:
    if num_proc is not None and num_proc > 1:
        raise ConfigError(
            f"num_proc={num_proc} has no effect on a stream, which is read in order",
            hint="leave num_proc out, or read the data without streaming=True",
        )
