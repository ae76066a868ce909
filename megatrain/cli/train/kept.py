"""Log-probabilities that are kept by row, up to a number of them."""

from collections import OrderedDict
from collections.abc import Sequence

from megatrain.types import FloatArray

MAX_VALUES = 1 << 25
"""Numbers that are kept where they can be computed again: 128 MiB."""


class Kept:
    """Arrays by row.  Beyond `max_values` numbers, those that were not asked for longest go.

    What it keeps depends on the order of calls alone, so it is the same on every rank.
    """

    def __init__(self, max_values: int = MAX_VALUES) -> None:
        self._max_values, self._num_values = max_values, 0
        self._arrays: OrderedDict[bytes, Sequence[FloatArray]] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._arrays

    def __getitem__(self, key: bytes) -> Sequence[FloatArray]:
        self._arrays.move_to_end(key)
        return self._arrays[key]

    def __setitem__(self, key: bytes, arrays: Sequence[FloatArray]) -> None:
        assert key not in self._arrays
        self._arrays[key] = arrays
        self._num_values += _size(arrays)

    def shrink(self) -> None:
        """Give up the oldest until there is room; the newest stays."""
        while self._num_values > self._max_values and len(self._arrays) > 1:
            _, arrays = self._arrays.popitem(last=False)
            self._num_values -= _size(arrays)


def _size(arrays: Sequence[FloatArray]) -> int:
    return sum(array.size for array in arrays)
