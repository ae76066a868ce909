"""Which row of Hugging Face's tensors is which row of a gated delta-net's input projection."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.models.conversion.param_mapping import (
    _fuse_gdn_separate_to_grouped,
    merge_gdn_linear_weights,
)


def delta_net_rows(config: Any, labels: Sequence[torch.Tensor], *, tp_size: int) -> torch.Tensor:
    """Return the labels of all TP ranks' rows in order, by Bridge's own code.

    `labels` are those of qkvz and ba (Qwen3-Next), or of qkv, z, b and a (Qwen3.5).  Bridge works
    on matrices as wide as the model; these have one column.
    """
    narrow = SimpleNamespace(
        hidden_size=1,
        linear_key_head_dim=config.linear_key_head_dim,
        linear_value_head_dim=config.linear_value_head_dim,
        linear_num_key_heads=config.linear_num_key_heads,
        linear_num_value_heads=config.linear_num_value_heads,
    )
    columns = [each[:, None] for each in labels]
    if len(columns) == 4:
        columns = list(_fuse_gdn_separate_to_grouped(narrow, *columns))
    merged: torch.Tensor = merge_gdn_linear_weights(narrow, *columns, tp_size=tp_size)
    return merged[:, 0]
