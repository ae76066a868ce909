"""A PEFT adapter's values put into an adapter of this rank's model, on any layout."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatrain.errors import ExportError
from megatrain.model.adapter import Adapter


@torch.no_grad()
def fill(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Give every factor on this rank its value, by canonical name, as `read_adapter` returns them.

    Raises ExportError for a factor that is missing.
    """
    for piece in adapter.slices():
        if piece.name not in tensors:
            raise ExportError(f"the adapter's files have no {piece.name}")
        whole = tensors[piece.name]
        if piece.dim is not None and piece.index is not None:
            whole = whole.index_select(piece.dim, piece.index.to(whole.device))
        piece.value.copy_(whole)
