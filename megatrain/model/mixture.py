"""Tokens of several adapters in one micro-batch: which tokens on this rank are whose.

Data of one adapter stand together, so that each adapter has one run of tokens, also after context
parallelism has taken its share of every sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mixture:
    """Runs of the T tokens of a micro-batch on this rank, one for each adapter, in order."""

    names: tuple[str, ...]
    """Adapters, each once; one that is "" means the base alone."""
    counts: tuple[int, ...]
    """Tokens of each (after CP, before sequence parallelism); they add up to T."""
    label_counts: tuple[int, ...]
    """Entries of the micro-batch's label_index_N that are each adapter's; they add up to N."""
    squares: tuple[float, ...]
    """Sum of the squared lengths of each adapter's sequences, on all CP ranks together."""

    def counts_of(self, num_rows: int, shard: int) -> tuple[int, ...]:
        """Return the runs among `num_rows` rows: all T, or this rank's shard of them over TP."""
        total = sum(self.counts)
        if num_rows == total:
            return self.counts
        assert total % num_rows == 0, (total, num_rows)
        return _overlaps(self.counts, shard * num_rows, (shard + 1) * num_rows)

    def ids(self, num_rows: int, shard: int, device: torch.device) -> Tensor:
        """Return the number of each row's adapter, float32 (rows,)."""
        counts = torch.tensor(self.counts_of(num_rows, shard), device=device)
        numbers = torch.arange(len(counts), dtype=torch.float32, device=device)
        return numbers.repeat_interleave(counts)


def _overlaps(counts: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """Return how much of each run lies in [start, stop)."""
    result, begin = [], 0
    for count in counts:
        end = begin + count
        result.append(max(0, min(end, stop) - max(begin, start)))
        begin = end
    return tuple(result)


@dataclass
class ActiveAdapters:
    """What the next forward pass uses; shared by all hooks of a model."""

    name: str | None = None
    """The one adapter of all tokens; None for the base alone, or a mixture."""
    mixture: Mixture | None = None
    """Set while a micro-batch of several adapters goes through a layer."""
    expert_ids_T: Tensor | None = None
    """Of the tokens that the dispatcher has brought to this rank's experts, in their order."""
