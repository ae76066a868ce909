"""Several data sets as one: one after another, or drawn with weights."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import datasets
import pyarrow as pa

from megatrain.data.table import Table
from megatrain.errors import ConfigError, DataError, StateError

type Stopping = Literal["first_exhausted", "all_exhausted"]


def chain(tables: Iterable[Table], names: Iterable[str]) -> Table:
    """Return the tables one after another.  Raises DataError, with `names`, for unlike columns."""
    tables = list(tables)
    if len(tables) == 1:
        return tables[0]
    with _named_columns(tables, list(names)):
        return datasets.concatenate_datasets(tables)


def mix(
    tables: Sequence[Table],
    names: Sequence[str],
    weights: Sequence[float] | None,
    seed: int,
    stopping: Stopping,
) -> Table:
    """Return one table: each row is drawn from table i with probability weights[i] / sum.

    Raises ConfigError for weights that are no probabilities, or not one a table, DataError for
    unlike columns.
    """
    if not tables:
        raise StateError("there is nothing to mix yet", hint="call add_dataset() first")
    if stopping not in get_args(Stopping.__value__):
        raise ConfigError(
            f"stopping must be one of {get_args(Stopping.__value__)}: got {stopping!r}"
        )
    if weights is None:
        return chain(tables, names)
    if len(weights) != len(tables) or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ConfigError(
            f"weights must be one positive number for each of {len(tables)} data sets: got "
            f"{list(weights)}",
            hint="in the order in which they were added; they need not add up to 1",
        )
    shares = [weight / math.fsum(weights) for weight in weights]
    with _named_columns(tables, names):
        return datasets.interleave_datasets(
            list(tables), probabilities=shares, seed=seed, stopping_strategy=stopping
        )


@contextmanager
def _named_columns(tables: Sequence[Table], names: Sequence[str]) -> Iterator[None]:
    """Say which column is of several types, where `datasets` cannot put tables together."""
    try:
        yield
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"the data have unlike columns: {_unlike(tables, names) or error}",
            hint="write the column in one way, or give each data set to add_dataset() and map() it "
            "with dataset_meta first",
        ) from error


def _unlike(tables: Sequence[Table], names: Sequence[str]) -> str:
    """Return the first column that has two types and where, "" if there is none."""
    known: dict[str, tuple[str, str]] = {}
    for table, name in zip(tables, names, strict=True):
        for column, kind in (table.features or {}).items():
            first, where = known.setdefault(column, (_type(kind), name))
            if "null" not in (first, _type(kind)) and first != _type(kind):
                return f"{column!r} is {first} in {where}, and {_type(kind)} in {name}"
    return ""


def _type(feature: Any) -> str:
    return str(getattr(feature, "dtype", feature))
