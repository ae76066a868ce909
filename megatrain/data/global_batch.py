"""A global batch, which tells its loader what a rank reads of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatrain.data.lazy_row import Row

Choose = Callable[[Sequence[int]], Sequence[int]]
"""From the lengths of a batch's rows to the numbers of those that this rank reads."""


class GlobalBatch(list[Mapping[str, Any]]):
    """The rows of a batch, the same on every rank (megatrain.types.ReadsAhead)."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], tell: Callable[[Choose], None]) -> None:
        super().__init__(rows)
        self._tell = tell

    def read_ahead(self, choose: Choose) -> None:
        """Let the loader read the rows of later batches that `choose` names."""
        self._tell(choose)


def read_chosen(batch: Sequence[Mapping[str, Any]], choose: Choose | None) -> None:
    """Read the rows that this rank will need, if it is known which, and if they are not read."""
    rows = [row for row in batch if isinstance(row, Row)]
    if choose is not None and len(rows) == len(batch):
        for index in choose([row.num_tokens for row in rows]):
            rows[index].read_ahead()
