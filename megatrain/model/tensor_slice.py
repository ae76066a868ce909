"""What a rank holds of a tensor that is spread over ranks, and what it trains of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A rank's part of a named tensor, and its place in the whole."""

    name: str
    """In the whole model, by Hugging Face's names."""
    value: Tensor
    """This rank's part, without gradient; a view where it can be."""
    full_shape: tuple[int, ...]
    dim: int | None
    """The dimension that is split over (expert) TP; None if every rank holds all of it."""
    index: Tensor | None
    """Where this rank's part lies along `dim` (int64)."""
    is_expert: bool


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Where a named tensor, or a rank's slice of it, lies inside a parameter of this rank.

    It reads and writes anything of the parameter's shape: weights, gradients, Adam's moments.
    """

    name: str
    full_shape: tuple[int, ...]
    dim: int | None
    index: Tensor | None
    is_expert: bool
    """All as in TensorSlice."""
    selection: tuple[int | slice | Tensor, ...] = ()
    """Indexes the parameter; empty for all of it."""

    def of(self, value: Tensor) -> TensorSlice:
        """Return this part of a tensor that has the parameter's shape."""
        part = value.detach()[self._on(value.device)]
        return TensorSlice(self.name, part, self.full_shape, self.dim, self.index, self.is_expert)

    def put(self, into: Tensor, part: Tensor) -> None:
        """Write this rank's slice into a tensor that has the parameter's shape."""
        into[self._on(into.device)] = part.to(into)

    def cut(self, whole: Tensor) -> Tensor:
        """Return this rank's slice of the whole tensor."""
        if self.dim is None or self.index is None:
            return whole
        return whole.index_select(self.dim, self.index.to(whole.device))

    def _on(self, device: torch.device) -> tuple[int | slice | Tensor, ...]:
        return tuple(s.to(device) if isinstance(s, Tensor) else s for s in self.selection)


@dataclass(frozen=True, slots=True)
class TrainedParameter:
    """A parameter with a gradient, and over which ranks that gradient is a sum."""

    parameter: torch.nn.Parameter
    is_expert: bool
    """Over expert-data parallel ranks, and expert TP instead of TP."""
    is_replicated: bool
    """The same on all TP ranks, each of which holds a part of the gradient's sum."""
    parts: tuple[TensorPart, ...]
    """The named tensors in it: q, k and v of a fused linear, one for each expert, or one."""
    tie: int | None = None
    """0 on the first pipeline stage and 1 on the last for an embedding that both hold."""
    factor: Literal["A", "B"] | None = None
    """Of LoRA; None for a parameter of the base."""
    place: Literal["embedding", "head", "layer"] = "layer"
    """In the token embedding, in the output layer, or between them."""

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face names of its parts; a LoRA factor's end in `.lora_A` or `.lora_B`."""
        return tuple(part.name for part in self.parts)

    @property
    def num_dims(self) -> int:
        """Dimensions of one part: 1 for norms and biases, 2 for matrices."""
        return len(self.parts[0].full_shape)


def over_tp(slices: Sequence[TensorSlice], group: dist.ProcessGroup) -> list[Tensor]:
    """Return whole tensors, on the slices' device, on every rank.  Collective over `group`.

    Slices of one dtype.  Each rank writes its own rows or columns into zeros; the sum over ranks is
    exact.
    """
    if not slices:
        return []
    sizes = [math.prod(each.full_shape) for each in slices]
    flat = slices[0].value.new_zeros(sum(sizes))
    result = []
    for each, piece in zip(slices, flat.split(sizes), strict=True):
        whole = piece.view(each.full_shape)
        if each.dim is None or each.index is None:
            if group.rank() == 0:
                whole.copy_(each.value)
        else:
            whole.index_copy_(each.dim, each.index.to(whole.device), each.value)
        result.append(whole)
    if group.size() > 1:
        dist.all_reduce(flat, group=group)
    return result
