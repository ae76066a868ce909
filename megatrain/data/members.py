"""The data sets that were added to one Dataset: each a table of its own until they become one."""

from collections.abc import Callable

from megatrain.data.fingerprint import fingerprint
from megatrain.data.meta import DatasetMeta
from megatrain.data.mixing import chain
from megatrain.data.table import Table
from megatrain.errors import ConfigError, StateError


class Members:
    """Tables with the data sets that they were read from, in the order in which they were added."""

    def __init__(self) -> None:
        self._tables: list[tuple[DatasetMeta, Table]] = []
        self._chained: Table | None = None
        self._is_merged = False

    def add(self, meta: DatasetMeta, table: Table) -> None:
        """Add one after those that are there."""
        self._tables.append((meta, table))
        self._chained = None

    def change(self, meta: DatasetMeta | None, step: Callable[[Table], Table]) -> None:
        """Put what `step` makes of it in the place of each table, or of the one of `meta` alone.

        Raises StateError where there is none, or they are one by now; ConfigError for one that was
        not added.
        """
        for index in self._indices(meta):
            known, table = self._tables[index]
            self._tables[index] = known, step(table)
            self._chained = None

    def merge(self, table: Table) -> None:
        """Let one table stand for all."""
        self._tables = [(self._tables[0][0], table)]
        self._chained, self._is_merged = None, True

    def table(self) -> Table:
        """Return all, one after the other, as one.  Raises StateError where there is none."""
        self._check_any()
        if self._chained is None:
            self._chained = chain(self.tables(), self.names())
        return self._chained

    def tables(self) -> list[Table]:
        """Return each."""
        return [table for _, table in self._tables]

    def names(self) -> list[str]:
        """Return what each was read from."""
        return [meta.describe() for meta, _ in self._tables]

    def fingerprint(self) -> str:
        """Return digits that are the same for the same data and steps."""
        return fingerprint(*(getattr(table, "_fingerprint", "") for table in self.tables()))

    def __len__(self) -> int:
        """Return the rows of all; none of them may be a stream."""
        return sum(len(table) for table in self.tables())

    def _check_any(self) -> None:
        if not self._tables:
            raise StateError("the dataset has no data yet", hint="call add_dataset() first")

    def _indices(self, meta: DatasetMeta | None) -> list[int]:
        self._check_any()
        if meta is not None and self._is_merged:
            raise StateError(
                "the data sets are one by now, and dataset_meta names one of several",
                hint="map() and filter() it before mix_dataset() and encode()",
            )
        found = [index for index, (known, _) in enumerate(self._tables) if meta in (None, known)]
        if not found:
            raise ConfigError(
                f"{meta.describe() if meta else meta} was not added to this dataset",
                hint=f"it has {', '.join(self.names())}",
            )
        return found
