"""Which queries see which keys, in a packed batch that may be split over context parallel ranks.

A sequence of S tokens (S a multiple of 2c) is cut into 2c chunks; rank r of c holds chunks r and
2c-1-r, so that every rank has the same causal work.  Source: the zig-zag split of ring attention
as Megatron-LM and Transformer Engine use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of queries of one sequence, and the keys up to the last of them."""

    q_start: int
    """First query, counted on this rank."""
    num_queries: int
    k_start: int
    """First key of the sequence, in the gathered order of `key_order`."""
    num_keys: int
    """Query i sees keys 0 .. num_keys - num_queries + i of the segment."""


def segments(lengths: Sequence[int], *, cp_size: int = 1, cp_rank: int = 0) -> tuple[Segment, ...]:
    """Return the segments of a rank for whole sequences of these lengths, packed in order."""
    if cp_size == 1:
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        return tuple(Segment(s, n, s, n) for s, n in zip(starts, lengths, strict=True))
    result, q_start, k_start = [], 0, 0
    for length in lengths:
        chunk = length // (2 * cp_size)
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            result.append(Segment(q_start, chunk, k_start, (index + 1) * chunk))
            q_start += chunk
        k_start += length
    return tuple(result)


def local_positions(lengths: Sequence[int], *, cp_size: int, cp_rank: int) -> list[int]:
    """Return, for each token on this rank, its index in the whole packed batch."""
    if cp_size == 1:
        return list(range(sum(lengths)))
    result: list[int] = []
    start = 0
    for length in lengths:
        chunk = length // (2 * cp_size)
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            first = start + index * chunk
            result.extend(range(first, first + chunk))
        start += length
    return result


def key_order(lengths: Sequence[int], *, cp_size: int) -> list[int]:
    """Return the permutation that puts keys gathered rank by rank into the batch's own order."""
    gathered = [
        position
        for rank in range(cp_size)
        for position in local_positions(lengths, cp_size=cp_size, cp_rank=rank)
    ]
    order = [0] * len(gathered)
    for index, position in enumerate(gathered):
        order[position] = index
    return order
