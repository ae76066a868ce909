"""Which samples share a packed row: best fit, longest first."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatrain.errors import ConfigError, DataError

Ints = npt.NDArray[np.int64]


def best_fit_decreasing(lengths: Sequence[int] | Ints, max_length: int) -> list[Ints]:
    """Return the samples' numbers in each packed row, by best-fit-decreasing bin packing.

    Samples are taken from the longest to the shortest; each goes into the row with the least space
    that still holds it, or opens a row (Johnson 1973; for packed training, Ding et al. 2024,
    arXiv:2404.10830).  Rows with equal space and samples of equal length are handled together, so
    that the time is O(n + pairs of a length and a space that meet).  In a row samples keep the
    dataset's order, and rows are in the order of their first samples: the result depends on
    `lengths` and `max_length` alone.  Raises DataError for a sample that fits in no row.
    """
    if max_length < 1:
        raise ConfigError(f"max_length must be at least 1 to pack to: got {max_length}")
    sizes = np.asarray(lengths, dtype=np.int64)
    _check(sizes, max_length)
    if not len(sizes):
        return []
    bins = _assign(sizes, max_length)
    firsts = np.full(int(bins.max()) + 1, len(sizes), dtype=np.int64)
    np.minimum.at(firsts, bins, np.arange(len(sizes)))
    order = np.lexsort((np.arange(len(sizes)), firsts[bins]))
    borders = np.flatnonzero(np.diff(firsts[bins][order])) + 1
    return np.split(order, borders)


def _assign(sizes: Ints, max_length: int) -> Ints:
    """Return the number of each sample's row."""
    bins = np.empty(len(sizes), dtype=np.int64)
    by_length = np.argsort(-sizes, kind="stable")
    space = _Space(max_length)
    values, starts = np.unique(-sizes[by_length], return_index=True)
    ends = [*starts[1:].tolist(), len(sizes)]
    for length, start, end in zip((-values).tolist(), starts.tolist(), ends, strict=True):
        bins[by_length[start:end]] = space.place(length, end - start)
    return bins


class _Space:
    """Open rows by the tokens that they still hold."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._rows: dict[int, list[int]] = {}
        self._present = 0
        """Bit s is set while some row has space s; whole numbers find the next one quickly."""
        self._num_rows = 0

    def place(self, length: int, count: int) -> list[int]:
        """Return the rows of `count` samples of `length` tokens, one after another."""
        placed: list[int] = []
        while len(placed) < count:
            left = count - len(placed)
            space = self._least(length)
            if space is None:
                space = self._max_length
                self._open(min(left, -(-left // (space // length))))
            each = space // length
            rows = self._take(space, -(-left // each))
            whole = left // each if left < len(rows) * each else len(rows)
            placed += [row for row in rows[:whole] for _ in range(each)]
            self._put(space - each * length, rows[:whole])
            for row in rows[whole:]:
                rest = count - len(placed)
                placed += [row] * rest
                self._put(space - rest * length, [row])
        return placed

    def _least(self, length: int) -> int | None:
        fitting = self._present >> length
        if not fitting:
            return None
        return length + (fitting & -fitting).bit_length() - 1

    def _open(self, count: int) -> None:
        self._put(self._max_length, list(range(self._num_rows, self._num_rows + count)))
        self._num_rows += count

    def _take(self, space: int, count: int) -> list[int]:
        rows = self._rows[space]
        taken = rows[-count:]
        del rows[-count:]
        if not rows:
            self._present &= ~(1 << space)
        return taken

    def _put(self, space: int, rows: list[int]) -> None:
        if rows:
            self._rows.setdefault(space, []).extend(rows)
            self._present |= 1 << space


def _check(sizes: Ints, max_length: int) -> None:
    wrong = np.flatnonzero((sizes < 1) | (sizes > max_length))
    if len(wrong):
        raise DataError(
            f"sample {wrong[0]} has {sizes[wrong[0]]} tokens, and a packed row holds 1 to "
            f"{max_length}",
            hint="truncate with the template, or raise max_length",
        )
