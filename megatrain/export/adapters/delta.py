"""What an adapter adds to the tensors of a checkpoint, by their names there.

O rows and I columns of a weight; A (r, I), B (O, r); E experts.  All arithmetic is float32, in the
order PEFT computes it: W + (B A) * scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatrain.errors import ExportError
from megatrain.export.adapters.low_rank import BLOCK_BYTES


@dataclass(frozen=True)
class Delta:
    """Added to one matrix of a tensor."""

    a: Tensor
    b: Tensor
    scale: float
    expert: int | None = None
    """Index into a tensor of all experts."""
    is_transposed: bool = False
    """The tensor holds (I, O), as embeddings do."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return the matrix's shape in the tensor."""
        shape = self.b.shape[0], self.a.shape[1]
        return (shape[1], shape[0]) if self.is_transposed else shape


@dataclass
class Deltas:
    """All that an adapter adds, by the tensor's name."""

    of: dict[str, list[Delta]] = field(default_factory=dict)

    def add(self, name: str, delta: Delta) -> None:
        """Add to a tensor; to one matrix more than once is an error of ours."""
        found = self.of.setdefault(name, [])
        assert all(each.expert != delta.expert for each in found), name
        found.append(delta)


GRID = 128
"""Rows that quantised formats have one scale for, or a multiple: none is read twice."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What a tensor must be stored in to be added to."""


def check_fits(deltas: Deltas, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ExportError, naming tensors, unless the checkpoint has all of them in these shapes."""
    missing = sorted(name for name in deltas.of if name not in shapes)
    if missing:
        raise ExportError(
            f"the base has no tensor for {len(missing)} adapted module(s): "
            f"{', '.join(missing[:5])}",
            hint="is this the base the adapter was made for?",
        )
    for name, found in deltas.of.items():
        for delta in found:
            whole = shapes[name] if delta.expert is None else shapes[name][1:]
            if whole != delta.shape:
                raise ExportError(
                    f"{name} has shape {shapes[name]}, but the adapter adds {delta.shape}",
                    hint="is this the base the adapter was made for?",
                )


def merged(source: Any, shape: tuple[int, ...], dtype: torch.dtype, deltas: list[Delta]) -> Tensor:
    """Return a tensor with everything added, if there is anything, rounded once.

    `source` is the tensor, or a lazy view of it that reads what is indexed: beside the result, no
    more than a block is in memory.
    """
    result = torch.empty(shape, dtype=dtype)
    if len(shape) == 2:
        _fill(result, source, (), deltas[0] if deltas else None)
        return result
    of = {delta.expert: delta for delta in deltas}
    for expert in range(shape[0]):
        _fill(result[expert], source, (slice(expert, expert + 1),), of.get(expert))
    return result


def _fill(into: Tensor, source: Any, before: tuple[slice, ...], delta: Delta | None) -> None:
    """Fill a matrix block by block of its rows; `before` selects it in the source."""
    if delta is not None:
        a, b = delta.a.float(), delta.b.float()
    rows = max(1, BLOCK_BYTES // (4 * into.shape[1]))
    if rows > GRID:
        rows -= rows % GRID
    for start in range(0, into.shape[0], rows):
        block = slice(start, min(start + rows, into.shape[0]))
        weight = source[(*before, block)].reshape(-1, into.shape[1])
        if delta is not None:
            product = (b @ a[:, block]).T if delta.is_transposed else b[block] @ a
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            weight = weight + product * delta.scale
        into[block] = weight.to(into.dtype)
