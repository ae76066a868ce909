"""Keys and values of all context parallel ranks, in the packed batch's own order."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """Concatenate over the group along dim 0; the gradient is summed over it and scattered back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        out = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad, group=ctx.group)
        return out, None


def gather_keys_and_values(
    k_TGD: Tensor, v_TGV: Tensor, order_S: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return keys and values of all S tokens from the T of each rank.  Collective over `group`.

    `order_S` is segments.key_order as an index tensor.
    """
    kv = torch.cat([k_TGD, v_TGV], -1)
    kv = _AllGather.apply(kv, group).index_select(0, order_S)
    k, v = kv.split([k_TGD.shape[-1], v_TGV.shape[-1]], -1)
    return k, v
