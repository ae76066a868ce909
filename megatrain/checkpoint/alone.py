"""Run Bridge's mappings on one rank without the others: nobody is asked or sent anything."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping


class Alone:
    """A process group of which this rank is, for a mapping's eyes, the first."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


@contextlib.contextmanager
def every_rank_is_the_first(rank: int, dtype: torch.dtype) -> Iterator[None]:
    """Let a mapping run without communication: it scatters to itself and keeps its own split."""

    def scatter(
        self: Any, splits: Any, output_shape: Any, dtype_: Any, device: Any, src_rank: int = 0
    ) -> torch.Tensor:
        split: torch.Tensor = splits[rank]
        return split if split.dtype == torch.int64 else split.to(device=device, dtype=dtype)

    def broadcast(self: Any, tensor: torch.Tensor, src_rank: int = 0) -> torch.Tensor:
        return tensor

    old_scatter = MegatronParamMapping.scatter_to_tp_ranks
    old_broadcast = MegatronParamMapping.broadcast_tensor_to_tp_ranks
    MegatronParamMapping.scatter_to_tp_ranks = scatter
    MegatronParamMapping.broadcast_tensor_to_tp_ranks = broadcast
    try:
        yield
    finally:
        MegatronParamMapping.scatter_to_tp_ranks = old_scatter
        MegatronParamMapping.broadcast_tensor_to_tp_ranks = old_broadcast
