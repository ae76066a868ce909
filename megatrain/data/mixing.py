"""Several data sets as one: one after another, or drawn with weights."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import datasets

from megatrain.data.table import Table
from megatrain.errors import ConfigError, StateError

type Stopping = Literal["first_exhausted", "all_exhausted"]


def chain(tables: Iterable[Table]) -> Table:
    """Return the tables one after another."""
    tables = list(tables)
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)


def mix(
    tables: Sequence[Table], weights: Sequence[float] | None, seed: int, stopping: Stopping
) -> Table:
    """Return one table: each row is drawn from table i with probability weights[i] / sum.

    Raises ConfigError for weights that are no probabilities, or not one a table.
    """
    if not tables:
        raise StateError("there is nothing to mix yet", hint="call add_dataset() first")
    if stopping not in get_args(Stopping.__value__):
        raise ConfigError(
            f"stopping must be one of {get_args(Stopping.__value__)}: got {stopping!r}"
        )
    if weights is None:
        return chain(tables)
    if len(weights) != len(tables) or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ConfigError(
            f"weights must be one positive number for each of {len(tables)} data sets: got "
            f"{list(weights)}",
            hint="in the order in which they were added; they need not add up to 1",
        )
    shares = [weight / math.fsum(weights) for weight in weights]
    return datasets.interleave_datasets(
        list(tables), probabilities=shares, seed=seed, stopping_strategy=stopping
    )
