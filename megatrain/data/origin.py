"""Where a row comes from: one integer a row, from which its file and line are told."""

_BITS = 40
"""Of the number of a row in its source; the bits above are the source's."""

ROW = "__row__"
"""The column with that integer."""


class Origins:
    """Sources of rows: files and hub data sets, in the order in which they were added."""

    def __init__(self) -> None:
        self._sources: list[tuple[str, str]] = []

    def add(self, name: str, unit: str) -> int:
        """Add a source whose rows are counted in `unit`s; return the integer of its number 0."""
        self._sources.append((name, unit))
        return (len(self._sources) - 1) << _BITS

    def where(self, row_id: int) -> str:
        """Return e.g. "data/train.jsonl, line 17"; numbers start from 1."""
        name, unit = self._sources[row_id >> _BITS]
        return f"{name}, {unit} {row_id & ((1 << _BITS) - 1)}"

    def names(self) -> str:
        """Return the names of all sources, the first three if there are many."""
        names = [name for name, _ in self._sources]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more

    def describe(self) -> list[tuple[str, str]]:
        """Return all sources, for a fingerprint."""
        return list(self._sources)
