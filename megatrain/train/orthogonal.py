"""Orthogonalised updates for Muon, where each matrix is spread over DP shards and TP slices.

Every rank of the data group sees all updates (P'); each orthogonalises its share of the matrices,
whole, and a reduce-scatter gives everybody the entries (Q) that it owns.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.model.tensor_slice import TensorPart, over_tp
from megatrain.train.sharded import ShardedParameters

MAX_ENTRIES = 1 << 28
"""Entries of whole matrices (1 GiB in float32) that are put together at a time."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    part: TensorPart
    update: Tensor
    """Of the parameter that holds the part."""
    result: Tensor
    """Of the same shape."""

    @property
    def num_entries(self) -> int:
        return math.prod(self.part.full_shape)

    @property
    def cost(self) -> int:
        return self.num_entries * min(self.part.full_shape)


def newton_schulz(
    updates_KMN: Tensor,
    coefficients: tuple[float, float, float],
    *,
    steps: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return K matrices with all singular values pulled towards 1, in `dtype`.

    Keller Jordan's quintic iteration, https://kellerjordan.github.io/posts/muon/, as in
    torch.optim.Muon, whose dtype is bfloat16.
    """
    a, b, c = coefficients
    x = updates_KMN.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def scale_of(shape: tuple[int, ...], adjust_lr_fn: str | None) -> float:
    """Return by what a matrix's learning rate is multiplied, as in torch.optim.Muon."""
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def orthogonalize(
    shard: ShardedParameters, update_Q: Tensor, is_chosen: Sequence[bool], options: dict[str, Any]
) -> Tensor:
    """Return the scaled orthogonal updates (Q,) of chosen parameters, zero elsewhere.

    `is_chosen` says which of shard.trained; `options` are those of a Muon group.  Collective over
    the data group and over (expert) TP.
    """
    flat_P = shard.gather_flat(update_Q)
    result_P = torch.zeros_like(flat_P)
    views = zip(shard.trained, shard.views(flat_P), shard.views(result_P), is_chosen, strict=True)
    matrices = [
        _Matrix(part, update, result)
        for trained, update, result, chosen in views
        if chosen
        for part in trained.parts
    ]
    for batch in _batches(_share_of(matrices, shard.data_group)):
        _orthogonalize_batch(batch, shard.tp_group, options)
    if shard.data_group.size() == 1:
        return result_P.to(update_Q.device)
    result_Q = result_P.new_empty(shard.shard_size)
    dist.reduce_scatter_tensor(result_Q, result_P, group=shard.data_group)
    return result_Q.to(update_Q.device)


def _share_of(matrices: list[_Matrix], group: dist.ProcessGroup) -> list[_Matrix]:
    """Return the matrices of this rank: the dearest first, each to whom has least to do."""
    loads, mine = [0] * group.size(), []
    for matrix in sorted(matrices, key=lambda m: (-m.cost, m.part.name)):
        rank = loads.index(min(loads))
        loads[rank] += matrix.cost
        if rank == group.rank():
            mine.append(matrix)
    return mine


def _batches(matrices: list[_Matrix]) -> list[list[_Matrix]]:
    batches: list[list[_Matrix]] = []
    size = 0
    for matrix in matrices:
        if not batches or size + matrix.num_entries > MAX_ENTRIES:
            batches.append([])
            size = 0
        batches[-1].append(matrix)
        size += matrix.num_entries
    return batches


def _orthogonalize_batch(
    batch: list[_Matrix], tp_group: dist.ProcessGroup, options: dict[str, Any]
) -> None:
    """Write the results of some matrices, all of one shape at a time.  Collective over TP."""
    wholes = over_tp([matrix.part.of(matrix.update) for matrix in batch], tp_group)
    by_shape = defaultdict(list)
    for matrix, whole in zip(batch, wholes, strict=True):
        by_shape[matrix.part.full_shape].append((matrix, whole))
    for shape, members in by_shape.items():
        stacked = newton_schulz(
            torch.stack([whole for _, whole in members]),
            options["ns_coefficients"],
            steps=options["ns_steps"],
            eps=options["eps"],
            dtype=getattr(torch, options["ns_dtype"]),
        )
        scale = scale_of(shape, options["adjust_lr_fn"])
        for (matrix, _), value in zip(members, stacked.float() * scale, strict=True):
            matrix.part.put(matrix.result, matrix.part.cut(value))
