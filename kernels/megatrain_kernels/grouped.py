"""One matrix product per expert over tokens that are sorted by expert.

T tokens, E experts, I in-features, O out-features.  `counts` has E entries that add up to T.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def grouped_linear_reference(
    x_TI: Tensor, weights_OI: Sequence[Tensor], counts: Sequence[int]
) -> Tensor:
    """Return x W_e^T for each run of tokens, shape (T, O).  This is the definition."""
    parts = x_TI.split(list(counts))
    return torch.cat([x @ w.T for x, w in zip(parts, weights_OI, strict=True)])


def grouped_linear(x_TI: Tensor, weights_OI: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Return x W_e^T for each run of tokens, shape (T, O).

    One grouped GEMM on a CUDA device in bfloat16 (torch's grouped_mm); elsewhere a loop.  An
    expert without tokens still takes part, with a gradient of zero.
    """
    if x_TI.is_cuda and x_TI.dtype == torch.bfloat16:
        weights = torch.stack(list(weights_OI)).transpose(1, 2)
        ends = torch.tensor(list(counts), device=x_TI.device).cumsum(0).to(torch.int32)
        return torch.nn.functional.grouped_mm(x_TI, weights, offs=ends)
    return grouped_linear_reference(x_TI, weights_OI, counts)
