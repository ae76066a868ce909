"""LoRA deltas of many adapters in one packed batch: each run of tokens has factors of its own.

T tokens in G runs of `counts` tokens each (they add up to T), I in-features, O out-features, S_g
the rank of run g, W the width of h, at least the largest S_g.  A run without an adapter has None.

    shrink   h = x A_g^T, zero beyond S_g             (T, I) -> (T, W)
    expand   out + h[:, :S_g] B_g^T                   (T, W), (T, O) -> (T, O)

Between the two stands the communication of a linear that is split over tensor parallel ranks.  The
plain loops are the definition.  On a CUDA device in bfloat16 all runs go in one grouped GEMM
(torch's grouped_mm) or, where a rank is not a multiple of 8, through Triton (multi_lora_triton.py).
Source of the idea: Chen et al., Punica, arXiv:2310.18547 (SGMV).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = Sequence[Tensor | None]
"""One matrix for each run of tokens: A (S_g, I) or B (O, S_g)."""

ALIGNMENT = 8
"""grouped_mm wants rows of 16 bytes: 8 entries of bfloat16."""


def shrink_reference(x_TI: Tensor, a_SI: Factors, counts: Sequence[int], width: int) -> Tensor:
    """Return h (T, W).  This is the definition."""
    parts = []
    for x, a in zip(x_TI.split(list(counts)), a_SI, strict=True):
        h = x.new_zeros(len(x), 0) if a is None else x @ a.T
        parts.append(torch.nn.functional.pad(h, (0, width - h.shape[1])))
    return torch.cat(parts)


def expand_reference(out_TO: Tensor, h_TW: Tensor, b_OS: Factors, counts: Sequence[int]) -> Tensor:
    """Return out + delta (T, O).  This is the definition."""
    runs = zip(out_TO.split(list(counts)), h_TW.split(list(counts)), b_OS, strict=True)
    return torch.cat(
        [
            out if b is None else torch.addmm(out, h[:, : b.shape[1]].to(out.dtype), b.T)
            for out, h, b in runs
        ]
    )


def shrink(x_TI: Tensor, a_SI: Factors, counts: Sequence[int], width: int) -> Tensor:
    """Return h (T, W) in the dtype of x."""
    if not _is_fast(x_TI):
        return shrink_reference(x_TI, a_SI, counts, width)
    padded = _stack([None if a is None else a.T for a in a_SI], (x_TI.shape[1], width), x_TI)
    return _grouped(x_TI, padded, counts)


def expand(out_TO: Tensor, h_TW: Tensor, b_OS: Factors, counts: Sequence[int]) -> Tensor:
    """Return out + delta (T, O) in the dtype of out."""
    if not _is_fast(out_TO):
        return expand_reference(out_TO, h_TW, b_OS, counts)
    shape = (h_TW.shape[1], out_TO.shape[1])
    padded = _stack([None if b is None else b.T for b in b_OS], shape, out_TO)
    return out_TO + _grouped(h_TW.to(out_TO.dtype), padded, counts)


def _is_fast(like: Tensor) -> bool:
    return like.is_cuda and like.dtype == torch.bfloat16


def _stack(matrices: Factors, shape: tuple[int, int], like: Tensor) -> Tensor:
    """Return matrices (K_g, N_g) as one tensor (G, K, N), zero where a matrix ends or is none."""
    rows, columns = shape
    whole = []
    for matrix in matrices:
        each = like.new_zeros(shape) if matrix is None else matrix.to(like.dtype)
        whole.append(
            torch.nn.functional.pad(each, (0, columns - each.shape[1], 0, rows - each.shape[0]))
        )
    return torch.stack(whole)


def _grouped(x_TK: Tensor, weights_GKN: Tensor, counts: Sequence[int]) -> Tensor:
    """Return x W_g for each run, (T, N)."""
    if any(size % ALIGNMENT for size in weights_GKN.shape[1:]):
        from megatrain_kernels.multi_lora_triton import grouped_matmul  # noqa: PLC0415 - needs Triton

        return grouped_matmul(x_TK, weights_GKN, counts)
    ends = torch.tensor(list(counts), device=x_TK.device).cumsum(0).to(torch.int32)
    return torch.nn.functional.grouped_mm(x_TK.contiguous(), weights_GKN, offs=ends)
