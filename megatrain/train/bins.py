"""Data dealt into bins of about the same length: arithmetic only, no torch."""

from collections.abc import Sequence

import numpy as np

from megatrain.config.model import DEFAULT_TOKENS_PER_MICROBATCH


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
