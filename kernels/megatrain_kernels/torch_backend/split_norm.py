"""RMSNorm over all heads of a token when each TP rank has some of them: OLMoE, MiniMax-M2.

The mean of squares is a sum over TP ranks, forward and backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatrain_kernels.torch_backend.norms import TorchNorm


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks that each rank uses for its own part of the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone()
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def split_rms_norm(x: Tensor, weight: Tensor, *, width: int, eps: float, group: Any) -> Tensor:
    """Return this rank's entries of the RMSNorm over `width` entries.  Collective over `group`."""
    wide = x.float()
    squares = wide.square().sum(-1, keepdim=True)
    if group is not None and group.size() > 1:
        squares = _SumOverRanks.apply(squares, group)
    return (wide * torch.rsqrt(squares / width + eps) * weight.float()).to(x.dtype)


class TorchHeadsNorm(TorchNorm):
    """OLMoE's norm of q and of k: the weight is whole on every rank, heads are split."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of this rank's heads, (..., heads * size).  Collective over TP."""
        group = parallel_state.get_tensor_model_parallel_group()
        width, own = self.weight.shape[0], x.shape[-1]
        if own * group.size() != width:
            raise ValueError(
                f"a norm over {width} entries cannot be split over tp={group.size()} ranks with "
                f"{own} entries each: tp must divide the number of key/value heads"
            )
        weight = self.weight[group.rank() * own : (group.rank() + 1) * own]
        return split_rms_norm(x, weight, width=width, eps=self.eps, group=group)


class TorchFullDimRMSNorm(torch.nn.Module):
    """MiniMax-M2's norm of q and of k: heads and weight are split."""

    def __init__(
        self,
        local_dim: int,
        global_dim: int,
        shard_world_size: int,
        tp_group_getter: Callable[[], Any],
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.local_dim, self.global_dim, self.eps = local_dim, global_dim, eps
        self.shard_world_size, self._group = shard_world_size, tp_group_getter
        self.weight = torch.nn.Parameter(torch.ones(local_dim, dtype=dtype))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return Megatron's description of the weight, split over heads, in a checkpoint."""
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self._group() or parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of this rank's heads (..., heads, size).  Collective over TP."""
        group = self._group()
        size = 1 if group is None else group.size()
        if size != self.shard_world_size:
            raise ValueError(
                f"tp={size} ranks share {self.shard_world_size} key/value heads: this norm needs a "
                "head of its own on each rank"
            )
        flat = x.flatten(-2)
        normed = split_rms_norm(flat, self.weight, width=self.global_dim, eps=self.eps, group=group)
        return normed.view_as(x)
