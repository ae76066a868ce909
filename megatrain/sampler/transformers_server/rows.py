"""Sequences that grow together: their key-value cache, aligned at the right.

The last token of every row stands in the last column; shorter rows begin later.  So rows join and
leave at any time, sliding windows hold, and one forward pass serves all.

B rows, T columns, H heads, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from megatrain.errors import ConfigError

GROWING = {"keys": 2, "values": 2, "indexer_keys": 1}
"""Tensors of a layer that have columns, and where."""
STATES = ("conv_states", "recurrent_states")
KNOWN = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    DynamicIndexedLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
)


class Rows:
    """A cache with, for each row, the number of columns before it begins."""

    def __init__(self, cache: DynamicCache, pads: list[int], columns: int) -> None:
        """Raises ConfigError for a cache whose rows cannot be moved."""
        strange = {type(layer).__name__ for layer in cache.layers if type(layer) not in KNOWN}
        if strange:
            raise ConfigError(
                f"the Transformers engine does not know how to batch this model: {sorted(strange)}",
                hint="sample with vLLM",
            )
        self.cache, self.pads, self.columns = cache, pads, columns

    def __len__(self) -> int:
        return len(self.pads)

    def mask(self, device: torch.device) -> Tensor | None:
        """Return [B, T + 1], 1 where a row has a token, for the next step; None: everywhere."""
        if not any(self.pads):
            return None
        starts = torch.tensor(self.pads, device=device)[:, None]
        return (torch.arange(self.columns + 1, device=device) >= starts).long()

    def positions(self, device: torch.device) -> Tensor:
        """Return [B, 1], the position of each row's next token."""
        return torch.tensor([[self.columns - pad] for pad in self.pads], device=device)

    def select(self, indices: Sequence[int], config: Any) -> "Rows":
        """Return these rows, which may repeat, without the columns that none of them has."""
        pads = [self.pads[index] for index in indices]
        cut = min(pads)
        columns = self.columns - cut
        cache = DynamicCache(config=config)
        _fill(cache, [(self.cache, torch.tensor(indices), columns)], columns)
        return Rows(cache, [pad - cut for pad in pads], columns)


def join(parts: Sequence[Rows], config: Any) -> Rows:
    """Return all rows of several, in their order."""
    if len(parts) == 1:
        return parts[0]
    columns = max(part.columns for part in parts)
    cache = DynamicCache(config=config)
    _fill(cache, [(part.cache, None, part.columns) for part in parts], columns)
    pads = [pad + columns - part.columns for part in parts for pad in part.pads]
    return Rows(cache, pads, columns)


def _fill(
    target: DynamicCache, sources: list[tuple[DynamicCache, Tensor | None, int]], columns: int
) -> None:
    """Fill an empty cache with rows of others, each brought to so many columns."""
    first = sources[0][0]
    while len(target.layers) < len(first.layers):  # a cache whose layers appear when they are used
        target.layers.append(type(first.layers[len(target.layers)])())
    for number, layer in enumerate(target.layers):
        old: Any = first.layers[number]
        for name, dim in GROWING.items():
            if getattr(old, name, None) is not None:
                width = _width(layer, columns)
                parts = [
                    _aligned(_rows(getattr(cache.layers[number], name), rows), dim, width)
                    for cache, rows, _ in sources
                ]
                setattr(layer, name, torch.cat(parts))
        for name in STATES:
            if getattr(old, name, None) is not None:
                parts = [_rows(getattr(c.layers[number], name), rows) for c, rows, _ in sources]
                setattr(layer, name, torch.cat(parts))
        _copy_marks(old, layer, columns)


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows.to(tensor.device))


def _width(layer: Any, columns: int) -> int:
    window = getattr(layer, "sliding_window", None)
    return columns if window is None else min(columns, window - 1)


def _aligned(tensor: Tensor, dim: int, width: int) -> Tensor:
    """Cut or fill a tensor at the left, so that it has so many columns."""
    have = tensor.shape[dim]
    if have >= width:
        return tensor.narrow(dim, have - width, width)
    shape = list(tensor.shape)
    shape[dim] = width - have
    return torch.cat([tensor.new_zeros(shape), tensor], dim)


def _copy_marks(old: Any, new: Any, columns: int) -> None:
    """Let a layer know that it is filled."""
    for name in (
        "dtype",
        "device",
        "is_initialized",
        "is_indexer_initialized",
        "indexer_dtype",
        "indexer_device",
        "is_conv_states_initialized",
        "is_recurrent_states_initialized",
        "has_previous_state",
        "conv_kernel_size",
    ):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    if hasattr(old, "cumulative_length"):
        new.cumulative_length = columns
    if hasattr(new, "max_batch_size") and getattr(new, "conv_states", None) is not None:
        new.max_batch_size = new.conv_states.shape[0]
