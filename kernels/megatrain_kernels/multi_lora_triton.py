"""One matrix product for each run of tokens, in one Triton launch: any sizes, no padding of runs.

T tokens in G runs, K in-features, N out-features.  A tile of rows never crosses the border of two
runs, so that each program reads one matrix.  Runs in Triton's interpreter on a processor too.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, INNER = 32, 64, 32
"""Sizes of a tile; Triton's matrix product wants 16 at least."""


@triton.jit
def _kernel(  # noqa: PLR0913 - pointers, sizes and strides
    x_ptr,
    w_ptr,
    out_ptr,
    start_ptr,
    stop_ptr,
    group_ptr,
    size_k,
    size_n,
    w_group,
    w_row,
    w_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    tile = tl.program_id(0)
    start, stop = tl.load(start_ptr + tile), tl.load(stop_ptr + tile)
    weight = w_ptr + tl.load(group_ptr + tile).to(tl.int64) * w_group
    rows = start + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, size_k, INNER):
        inner = first + tl.arange(0, INNER)
        x_mask = (rows[:, None] < stop) & (inner[None, :] < size_k)
        x = tl.load(x_ptr + rows[:, None].to(tl.int64) * size_k + inner[None, :], x_mask, 0.0)
        w_mask = (inner[:, None] < size_k) & (columns[None, :] < size_n)
        w = tl.load(weight + inner[:, None] * w_row + columns[None, :] * w_column, w_mask, 0.0)
        total += tl.dot(x, w, input_precision="ieee")
    mask = (rows[:, None] < stop) & (columns[None, :] < size_n)
    where = out_ptr + rows[:, None].to(tl.int64) * size_n + columns[None, :]
    tl.store(where, total.to(out_ptr.dtype.element_ty), mask)


def _tiles(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return first row, end of the run and run of each tile of rows, int32 (3, tiles)."""
    tiles, begin = [], 0
    for group, count in enumerate(counts):
        end = begin + count
        tiles += [(start, end, group) for start in range(begin, end, ROWS)]
        begin = end
    return torch.tensor(tiles, dtype=torch.int32, device=device).reshape(-1, 3).T.contiguous()


def _product(x_TK: Tensor, weights_GKN: Tensor, tiles: Tensor) -> Tensor:
    size_k, size_n = weights_GKN.shape[1:]
    out = x_TK.new_zeros(len(x_TK), size_n)
    if tiles.shape[1] and size_n:
        grid = (tiles.shape[1], triton.cdiv(size_n, COLUMNS))
        strides = weights_GKN.stride()
        _kernel[grid](
            x_TK.contiguous(), weights_GKN, out, *tiles, size_k, size_n, *strides,
            ROWS=ROWS, COLUMNS=COLUMNS, INNER=INNER,
        )  # fmt: skip
    return out


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weights_GKN: Tensor, counts: list[int]) -> Tensor:
        tiles = _tiles(counts, x_TK.device)
        ctx.save_for_backward(x_TK, weights_GKN, tiles)
        ctx.counts = counts
        return _product(x_TK, weights_GKN, tiles)

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TK, weights_GKN, tiles = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad_TN, weights_GKN.transpose(1, 2), tiles)
        if ctx.needs_input_grad[1]:
            runs = zip(x_TK.split(ctx.counts), grad_TN.split(ctx.counts), strict=True)
            grad_w = torch.stack([x.T @ grad for x, grad in runs])
        return grad_x, grad_w, None


def grouped_matmul(x_TK: Tensor, weights_GKN: Tensor, counts: Sequence[int]) -> Tensor:
    """Return x W_g for each run of `counts` tokens, (T, N), accumulated in float32."""
    result: Tensor = _GroupedMatmul.apply(x_TK, weights_GKN, list(counts))
    return result
