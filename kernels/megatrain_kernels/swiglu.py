"""SwiGLU: silu(gate) * up of a fused projection, with few passes over memory.

T tokens, F the width of each half.  Source: Shazeer, arXiv:2002.05202.
"""

from typing import Any

import torch
from torch import Tensor


def swiglu_reference(x_T2F: Tensor) -> Tensor:
    """Return silu(gate) * up for x = [gate, up], shape (T, F): the definition."""
    gate, up = x_T2F.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


class _Swiglu(torch.autograd.Function):
    """The same; both halves of the gradient are written into one buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        gate_grad, up_grad = out.chunk(2, -1)
        torch.mul(torch.nn.functional.silu(gate), grads[0], out=up_grad)
        gate_grad.copy_(torch.ops.aten.silu_backward(grads[0] * up, gate))
        return out


def swiglu(x_T2F: Tensor) -> Tensor:
    """Return swiglu_reference(x)."""
    result: Tensor = _Swiglu.apply(x_T2F)
    return result
