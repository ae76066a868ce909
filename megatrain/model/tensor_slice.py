"""What a rank holds of a tensor that is spread over ranks, and what it trains of it."""

from dataclasses import dataclass

import torch
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
class TrainedParameter:
    """A parameter with a gradient, and over which ranks that gradient is a sum."""

    parameter: torch.nn.Parameter
    is_expert: bool
    """Over expert-data parallel ranks, and expert TP instead of TP."""
    is_replicated: bool
    """The same on all TP ranks, each of which holds a part of the gradient's sum."""
    tie: int | None = None
    """0 on the first pipeline stage and 1 on the last for an embedding that both hold."""
