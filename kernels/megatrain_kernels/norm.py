"""RMSNorm and LayerNorm as Transformer Engine defines them.  Statistics are in float32."""

from typing import Any

import torch
from torch import Tensor


def rms_norm_reference(
    x: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False
) -> Tensor:
    """Return x / rms(x) * weight over the last dimension, in x's dtype: the definition.

    With `zero_centered` the factor is 1 + weight.  Source: Zhang and Sennrich, arXiv:1910.07467.
    The product with the weight is taken in float32, as in Transformer Engine; Transformers rounds
    to x's dtype before it, which is the same in float32.
    """
    scale = weight.float() + 1.0 if zero_centered else weight.float()
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * scale).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    """The same with few passes over x: the reciprocal of rms(x) is kept, x is read again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        square = torch.linalg.vecdot(x32, x32).unsqueeze(-1)
        rstd = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, rstd)
        return (x32 * rstd).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scale, rstd = ctx.saved_tensors
        grad, x32 = grads[0].float(), x.float()
        scale_grad = None
        if ctx.needs_input_grad[1]:
            scale_grad = (grad * x32 * rstd).flatten(0, -2).sum(0)
        grad = grad * scale
        dot = torch.linalg.vecdot(grad, x32).unsqueeze(-1)
        dot.mul_(rstd.square()).div_(-x.shape[-1])
        return grad.addcmul_(x32, dot).mul_(rstd).to(x.dtype), scale_grad, None


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False) -> Tensor:
    """Return rms_norm_reference(x, weight); differentiable in both."""
    scale = weight.float() + 1.0 if zero_centered else weight.float()
    result: Tensor = _RmsNorm.apply(x, scale, eps)
    return result


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, zero_centered: bool = False
) -> Tensor:
    """Return the layer norm of x over the last dimension, in x's dtype."""
    scale = weight.float() + 1.0 if zero_centered else weight.float()
    shift = None if bias is None else bias.float()
    return torch.nn.functional.layer_norm(x.float(), (x.shape[-1],), scale, shift, eps).to(x.dtype)
