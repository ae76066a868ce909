"""A preference pair that is not read yet: two rows, chosen and rejected, of known sizes."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from megatrain.data.lazy_row import Row, Stopwatch

SIDES = ("chosen", "rejected")


class PairRow(Row):
    """A Row of a pair.  `sides` are its two data, which are read with it, once."""

    __slots__ = ("sides",)

    def __init__(
        self,
        read: Callable[[], Mapping[str, Any]],
        *,
        key: str,
        num_tokens: int,
        num_labels: int,
        chosen: tuple[int, int],
        numbers: Collection[str] = (),
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """`chosen` is the number of tokens and of labels of the first side."""
        super().__init__(
            read,
            key=key,
            num_tokens=num_tokens,
            num_labels=num_labels,
            numbers=numbers,
            stopwatch=stopwatch,
        )
        rejected = (num_tokens - chosen[0], num_labels - chosen[1])
        self.sides = (self._side("chosen", *chosen), self._side("rejected", *rejected))

    def _side(self, side: str, num_tokens: int, num_labels: int) -> Row:
        return Row(
            lambda: side_of(self, side),
            key=f"{self.key}/{side}",
            num_tokens=num_tokens,
            num_labels=num_labels,
            numbers=[
                name.removeprefix(f"{side}_")
                for name in self.numbers
                if name.startswith(f"{side}_")
            ],
        )


def side_of(row: Mapping[str, Any], side: str) -> dict[str, Any]:
    """Return one datum of a pair: the columns with this prefix, without it."""
    prefix = f"{side}_"
    return {
        name.removeprefix(prefix): value
        for name, value in row.items()
        if name.startswith(prefix) and value is not None
    }
