"""Sums over labels, sequences and pairs.  N labels, S sequences, P = S / 2 pairs.

Sums are over segments, not index_add: CUDA's adds in any order, and a step shall be the same again.
"""

import torch
from torch import Tensor


def sequence_sums(values_N: Tensor, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Return (S,): the sum of `values_N` over each sequence's labels."""
    counts_S = _counts(sequence_N, num_sequences)
    # One after the other, so in float64: a long sequence would lose digits in float32.
    sums_S = torch.segment_reduce(
        values_N.double(), "sum", lengths=counts_S, unsafe=True, initial=0.0
    )
    return sums_S.to(values_N.dtype)


def label_counts(sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Return (S,) float32: how many labels a sequence has, at least 1 so that it can divide."""
    return _counts(sequence_N, num_sequences).clamp(min=1).float()


def _counts(sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Return (S,) int64: how many labels a sequence has; they are in the order of the sequences."""
    borders = torch.arange(num_sequences + 1, device=sequence_N.device)
    return torch.searchsorted(sequence_N, borders).diff()


def split_pairs(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (P,) values of data 2i, the chosen, and of data 2i + 1, the rejected."""
    return values_S[0::2], values_S[1::2]


def measure(values: Tensor) -> tuple[Tensor, float]:
    """Return a statistic: the sum of `values`, without gradient, and their number."""
    return values.detach().float().sum(), float(values.numel())
