"""Which data are meant: an id or a path, a subset, a split, and a slice of the rows."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.errors import ConfigError, DataError

type DataSlice = range | slice | Iterable[int] | None


@dataclass(frozen=True)
class DatasetMeta:
    """Names a data set; nothing is read before a Dataset is made of it.

    Raises ConfigError for an empty id and for a slice that is no rows' numbers.
    """

    dataset_id: str | Path
    """A json, jsonl, csv, parquet or arrow file, a folder of them, `hf://id`, `ms://id`, or an id
    of the Hugging Face hub.  A path that exists wins.  Code of a repository is never run."""
    subset_name: str | None = "default"
    """A hub's configuration; of a local folder, the folder in it."""
    split: str = "train"
    """A hub's split; of a local folder, the files named after it (all files, if none is named
    after any split and this is "train")."""
    data_slice: DataSlice = None
    """Numbers of the rows to keep, from 0: a range or a slice, cut at the end of the data, or any
    iterable of numbers, which must all be there.  For a folder they count over all its files."""

    def __post_init__(self) -> None:
        if not str(self.dataset_id).strip():
            raise ConfigError("dataset_id is empty", hint="give a file, a folder or a hub's id")
        numbers = self.data_slice
        if numbers is None or isinstance(numbers, range):
            return
        if isinstance(numbers, slice):
            _check_numbers(
                value for value in (numbers.start, numbers.stop, numbers.step) if value is not None
            )
            return
        if isinstance(numbers, str) or not isinstance(numbers, Iterable):
            raise ConfigError(
                f"data_slice must be a range, a slice or row numbers: got {numbers!r}",
                hint="range(1000) keeps the first thousand rows",
            )
        object.__setattr__(self, "data_slice", _check_numbers(numbers))

    @property
    def subset(self) -> str | None:
        """The subset's name, None for the default one."""
        return None if self.subset_name in (None, "", "default") else self.subset_name

    def describe(self) -> str:
        """Return the data set's name for messages."""
        subset = f"/{self.subset}" if self.subset else ""
        return f"{self.dataset_id}{subset}[{self.split}]"

    def chosen_rows(self, num_rows: int) -> range | list[int] | None:
        """Return the numbers of the chosen rows out of `num_rows`; None means all of them.

        Raises DataError where a number of an iterable is not there.
        """
        chosen = self.data_slice
        if chosen is None:
            return None
        if isinstance(chosen, slice):
            return range(num_rows)[chosen]
        if isinstance(chosen, range):
            if chosen.start >= 0 and chosen.step > 0:
                return range(chosen.start, min(chosen.stop, num_rows), chosen.step)
            return [number for number in chosen if 0 <= number < num_rows]
        numbers = list(chosen)
        wrong = [number for number in numbers if not -num_rows <= number < num_rows]
        if wrong:
            raise DataError(
                f"{self.describe()} has {num_rows} rows, and data_slice asks for row {wrong[0]}",
                hint="rows are counted from 0; a range is cut at the end of the data",
            )
        return [number % num_rows for number in numbers]


def _check_numbers(numbers: Iterable[Any]) -> tuple[int, ...]:
    """Return whole numbers.  Raises ConfigError for others."""
    checked = []
    for number in numbers:
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise ConfigError(
                f"data_slice must be made of whole numbers: got {number!r}",
                hint="rows are counted from 0",
            )
        checked.append(operator.index(number))
    return tuple(checked)
