"""Sums over labels, sequences and pairs.  N labels, S sequences, P = S / 2 pairs."""

import torch
from torch import Tensor


def sequence_sums(values_N: Tensor, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Return (S,): the sum of `values_N` over each sequence's labels."""
    return values_N.new_zeros(num_sequences).index_add(0, sequence_N, values_N)


def label_counts(sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Return (S,) float32: how many labels a sequence has, at least 1 so that it can divide."""
    return torch.bincount(sequence_N, minlength=num_sequences).clamp(min=1).float()


def split_pairs(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (P,) values of data 2i, the chosen, and of data 2i + 1, the rejected."""
    return values_S[0::2], values_S[1::2]


def measure(values: Tensor) -> tuple[Tensor, float]:
    """Return a statistic: the sum of `values`, without gradient, and their number."""
    return values.detach().float().sum(), float(values.numel())
