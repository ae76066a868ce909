"""Megatron's rotary embedding of packed sequences without a loop over sequences."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatrain_kernels.rotary import rotate

Apply = Callable[..., Tensor]


def packed_rotary(original: Apply) -> Apply:
    """Return a stand-in for megatron's apply_rotary_pos_emb.

    It takes the packed sequences of `packed_sequences` (whose cu_seqlens carry the positions of
    this rank's tokens) at once, with cos and sin formed once per batch; anything else goes to
    `original`.
    """

    def apply_rotary_pos_emb(
        t: Tensor,
        freqs: Tensor,
        config: Any,
        cu_seqlens: Tensor | None = None,
        mscale: float = 1.0,
        cp_group: Any = None,
        mla_rotary_interleaved: bool = False,
    ) -> Tensor:
        index = getattr(cu_seqlens, "positions_T", None)
        plain = not (
            config.rotary_interleaved or mla_rotary_interleaved or config.apply_rope_fusion
        )
        if index is None or not plain or freqs.shape[0] <= cu_seqlens.last_position:  # type: ignore[union-attr]
            return original(t, freqs, config, cu_seqlens, mscale, cp_group, mla_rotary_interleaved)
        cos, sin = _cos_and_sin(cu_seqlens, freqs, mscale, t)
        return rotate(t, cos, sin)

    vars(apply_rotary_pos_emb)["is_packed"] = True
    return apply_rotary_pos_emb


def _cos_and_sin(
    cu_seqlens: Any, freqs: Tensor, mscale: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cos and sin (T, 1, R) of this batch; layers of one forward pass share them."""
    cached = getattr(cu_seqlens, "cos_and_sin", None)
    if cached is None or cached[0] is not freqs or cached[1:3] != (mscale, like.dtype):
        angles = freqs[cu_seqlens.positions_T, 0]
        cos, sin = ((f(angles) * mscale).to(like.dtype) for f in (Tensor.cos, Tensor.sin))
        cached = (freqs, mscale, like.dtype, cos, sin)
        cu_seqlens.cos_and_sin = cached
    return cached[3], cached[4]
