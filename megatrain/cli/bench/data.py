"""The batch of a benchmark: random tokens of mixed lengths, labels on all of them.  Torch-free."""

import random

from megatrain.cli.bench.shapes import Lengths
from megatrain.types import InputFeature

SHORT_PERCENT, LONG_PERCENT = 15, 15
"""Of the data; the others are of middle length."""


def draw_lengths(lengths: Lengths, *, seed: int) -> list[int]:
    """Return the tokens of each datum, in mixed order; the extremes are always among them.

    Short is up to an eighth of the longest, middle up to its half, long from three quarters on.
    """
    order, top = random.Random(seed), lengths.longest
    num_short = max(1, round(lengths.count * SHORT_PERCENT / 100))
    num_long = max(1, round(lengths.count * LONG_PERCENT / 100))
    num_middle = lengths.count - num_short - num_long
    drawn = [order.randint(lengths.shortest, top // 8) for _ in range(num_short - 1)]
    drawn += [order.randint(top // 8, top // 2) for _ in range(num_middle)]
    drawn += [order.randint(3 * top // 4, top) for _ in range(num_long - 1)]
    drawn += [lengths.shortest, top]
    order.shuffle(drawn)
    return drawn


def draw_batch(lengths: Lengths, *, vocab_size: int, seed: int) -> list[InputFeature]:
    """Return the batch."""
    order = random.Random(seed + 1)
    batch: list[InputFeature] = []
    for length in draw_lengths(lengths, seed=seed):
        ids = order.choices(range(vocab_size), k=length)
        batch.append({"input_ids": ids, "labels": ids})
    return batch


def padded_batches(lengths: list[int], *, max_tokens: int) -> list[list[int]]:
    """Return which data are padded to one length together, longest first.

    Data are sorted by length, so that little is padded, and a batch has at most `max_tokens`
    with its padding, unless a single datum has more.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
