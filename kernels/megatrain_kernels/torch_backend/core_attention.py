"""Core attention for packed sequences, with context parallelism by gathering keys and values."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from megatrain_kernels.attention import packed_attention
from megatrain_kernels.context_parallel import gather_keys_and_values
from megatrain_kernels.segments import Segment, key_order, local_positions, segments


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed batch, and what is worked out from it once per batch."""

    segments: tuple[Segment, ...] = ()
    """Which queries of this rank see which keys."""
    order_S: Tensor | None = None
    """Where each token's key is among the keys gathered over context parallel ranks."""
    mixture: Any = None
    """What a layer's adapters must know of these tokens; kernels do not look at it."""


def packed_sequences(lengths: list[int], *, cp_group: Any, device: torch.device) -> PackedSequences:
    """Describe whole sequences of these lengths; with CP each is a multiple of 2 * cp."""
    cp_size, cp_rank = cp_group.size(), cp_group.rank()
    ends: Any = torch.tensor([0, *lengths], dtype=torch.int32, device=device)
    ends = ends.cumsum(0).to(torch.int32)
    starts = [start for start, n in zip(ends.tolist(), lengths, strict=False) for _ in range(n)]
    mine = local_positions(lengths, cp_size=cp_size, cp_rank=cp_rank)
    # Megatron hands nothing but cu_seqlens to the rotary embedding: they carry what it needs.
    ends.positions_T = torch.tensor([i - starts[i] for i in mine], device=device)
    ends.last_position = max(lengths) - 1
    order = None
    if cp_size > 1:
        order = torch.tensor(key_order(lengths, cp_size=cp_size), device=device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        segments=segments(lengths, cp_size=cp_size, cp_rank=cp_rank),
        order_S=order,
    )


class TorchCoreAttention(torch.nn.Module):
    """Causal softmax attention over SDPA; `softmax_offset` is the parameter of learnable sinks."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"the torch back end has no attention dropout: {dropout}")
        if attention_type != "self":
            raise ValueError(f"the torch back end has self-attention only: {attention_type!r}")
        self.config, self.pg_collection = config, pg_collection
        self.scale = softmax_scale or 1 / math.sqrt(k_channels or config.kv_channels)
        if config.apply_query_key_layer_scaling:
            self.scale /= max(1, layer_number)
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window = config.window_size[0] if windowed else None
        self.softcap: float | None = None
        """Bound of the logits, where a family has one."""
        self._make_sinks()

    def _make_sinks(self) -> None:
        kind = getattr(self.config, "softmax_type", "vanilla")
        heads = self.config.num_attention_heads // self.config.tensor_model_parallel_size
        zeros = torch.zeros(heads, dtype=self.config.params_dtype)
        self.softmax_offset: Tensor | None = None
        if kind == "learnable":
            self.softmax_offset = torch.nn.Parameter(zeros)
        elif kind == "off-by-one":
            self.register_buffer("softmax_offset", zeros, persistent=False)
        elif kind != "vanilla":
            raise ValueError(f"the torch back end does not know softmax_type={kind!r}")

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return Megatron's description of the sinks, split over heads, in a checkpoint."""
        if not isinstance(self.softmax_offset, torch.nn.Parameter):
            return {}
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"softmax_offset": self.softmax_offset},
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.pg_collection.tp,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        return result

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend causally.

        Packed: query (T, H, D), key (T, G, D), value (T, G, V) -> (T, H * V).
        Unpacked: (S, B, H, D) and so on -> (S, B, H * V); only without context parallelism.
        """
        if packed_seq_params is None:
            return self._unpacked(query, key, value)
        packed = packed_seq_params
        if not isinstance(packed, PackedSequences):
            ends = packed.cu_seqlens_q_padded
            ends = packed.cu_seqlens_q if ends is None else ends
            lengths = (ends[1:] - ends[:-1]).tolist()
            packed = packed_sequences(lengths, cp_group=self.pg_collection.cp, device=query.device)
        if packed.order_S is not None:
            key, value = gather_keys_and_values(key, value, packed.order_S, self.pg_collection.cp)
        return self._attend(query, key, value, packed.segments).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, pieces: tuple[Segment, ...]) -> Tensor:
        return packed_attention(
            q,
            k,
            v,
            pieces,
            scale=self.scale,
            window=self.window,
            sinks_H=self.softmax_offset,
            softcap=self.softcap,
        )

    def _unpacked(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.pg_collection is not None and self.pg_collection.cp.size() > 1:
            raise ValueError("context parallelism needs packed sequences (qkv_format='thd')")
        length, batch = query.shape[:2]
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        out = self._attend(q, k, v, segments([length] * batch))
        return out.view(batch, length, -1).transpose(0, 1)
