"""How far apart the values of two stored tensors are, block by block."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.checkpoint.safetensors_file import DTYPES
from megatrain.errors import CheckpointError
from megatrain.export.compare.headers import StoredTensor

BLOCK_ENTRIES = 1 << 22


@dataclass(frozen=True, slots=True)
class Distance:
    """The largest difference between two tensors."""

    max_abs: float
    relative: float
    """max_abs / the largest entry of the first tensor; infinite where one has a NaN alone."""


def distance(a: StoredTensor, b: StoredTensor, *, rounded: bool = False) -> Distance:
    """Compare two tensors of one shape in float64.

    rounded=True rounds both to the narrower dtype first: masters beside what was saved of them.
    Raises CheckpointError for a dtype whose values torch cannot read.
    """
    dtypes = [_dtype(a), _dtype(b)]
    narrow = min(dtypes, key=lambda dtype: dtype.itemsize) if rounded else None
    largest = scale = 0.0
    for one, other in zip(_blocks(a), _blocks(b), strict=True):
        if narrow is not None:
            one, other = one.to(narrow), other.to(narrow)
        one, other = one.double(), other.double()
        difference = torch.where(one == other, 0.0, (one - other).abs())
        difference[one.isnan() & other.isnan()] = 0.0
        largest = max(largest, float(difference.nan_to_num(math.inf).max()))
        finite = one[one.isfinite()]
        scale = max(scale, float(finite.abs().max()) if finite.numel() else 0.0)
    return Distance(largest, 0.0 if not largest else largest / scale if scale else math.inf)


def _dtype(tensor: StoredTensor) -> torch.dtype:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"values of dtype {tensor.dtype} can be compared as bytes only: {tensor.name}",
            hint="leave --tolerance out",
        )
    return DTYPES[tensor.dtype]


def _blocks(tensor: StoredTensor) -> Iterator[Tensor]:
    dtype = _dtype(tensor)
    for block in tensor.blocks(BLOCK_ENTRIES * dtype.itemsize):
        yield torch.frombuffer(bytearray(block), dtype=dtype)
