"""Data dealt into bins of about the same length: arithmetic only, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatrain.config.model import DEFAULT_TOKENS_PER_MICROBATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealer:
    """How batches are dealt to data parallel ranks, and which of them this one is."""

    num_ranks: int
    rank: int
    multiple: int
    max_tokens: int | None
    max_data: int | None
    """All but `rank` as in plan_bins."""

    def deal(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the bins of data of these lengths."""
        return plan_bins(
            lengths,
            num_ranks=self.num_ranks,
            multiple=self.multiple,
            max_tokens=self.max_tokens,
            max_data=self.max_data,
        )

    def own(self, lengths: Sequence[int]) -> list[int]:
        """Return the data that this rank reads."""
        own = self.deal(lengths)[self.rank :: self.num_ranks]
        return [index for members in own for index in members]


def plan_bins(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    multiple: int = 1,
    max_tokens: int | None = None,
    max_data: int | None = None,
) -> list[list[int]]:
    """Deal data into bins, a multiple of num_ranks * multiple of them, as even as can be.

    The longest datum goes first, each to the least full bin (longest processing time first,
    Graham 1969); bins are added until none is over `max_tokens` with more than one datum, or over
    `max_data`.  Bin b belongs to rank b % num_ranks.
    """
    unit = num_ranks * multiple
    budget = max_tokens or DEFAULT_TOKENS_PER_MICROBATCH
    need = -(-len(lengths) // max_data) if max_data else -(-sum(lengths) // budget)
    count = max(1, -(-min(need, len(lengths)) // unit)) * unit
    while True:
        bins = _deal(lengths, count, max_data)
        over = [b for b in bins if not max_data and len(b) > 1 and _total(b, lengths) > budget]
        if not over:
            return [sorted(b) for b in bins]
        count += unit


def _total(members: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in members)


def _deal(lengths: Sequence[int], count: int, max_data: int | None) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = np.zeros(count)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = int(np.argmin(loads))
        bins[target].append(index)
        loads[target] += lengths[index]
        if max_data and len(bins[target]) >= max_data:
            loads[target] = np.inf
    return bins
