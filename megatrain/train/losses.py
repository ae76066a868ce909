"""Losses as functions of per-token log-probabilities.  Each is a sum over tokens.

N labels of one micro-batch on this rank; the sum over micro-batches and ranks is the loss of the
global batch, and the division by its tokens comes at the optimizer step.
"""

from torch import Tensor


def cross_entropy(logps_N: Tensor, weights_N: Tensor) -> Tensor:
    """Return the sum of -weight * log p, a scalar."""
    return -(logps_N * weights_N).sum()
