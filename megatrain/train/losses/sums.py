"""Sums over labels, sequences and pairs.  N labels, S sequences, P = S / 2 pairs.

Sums are over a mask, not index_add: CUDA's adds in any order, and a step shall be the same again.
"""

import torch
from torch import Tensor


def sequence_sums(values_N: Tensor, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Return (S,): the sum of `values_N` over each sequence's labels."""
    return torch.where(_members(sequence_N, num_sequences), values_N, 0.0).sum(1)


def label_counts(sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Return (S,) float32: how many labels a sequence has, at least 1 so that it can divide."""
    return _members(sequence_N, num_sequences).sum(1).clamp(min=1).float()


def _members(sequence_N: Tensor, num_sequences: int) -> Tensor:
    return sequence_N == torch.arange(num_sequences, device=sequence_N.device)[:, None]


def split_pairs(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (P,) values of data 2i, the chosen, and of data 2i + 1, the rejected."""
    return values_S[0::2], values_S[1::2]


def measure(values: Tensor) -> tuple[Tensor, float]:
    """Return a statistic: the sum of `values`, without gradient, and their number."""
    return values.detach().float().sum(), float(values.numel())
