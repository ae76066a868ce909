"""Rotary position embedding over packed tokens, all sequences at once.

T tokens, H heads, D the size of a head, R <= D the part of it that is rotated (in two halves).
Source: Su et al., arXiv:2104.09864, with the halves of GPT-NeoX.
"""

from typing import Any

import torch
from torch import Tensor


def rotate_reference(x_THD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """Return x cos + rotate_half(x) sin on the first R entries of each head: the definition."""
    size = cos_T1R.shape[-1]
    x, rest = x_THD[..., :size], x_THD[..., size:]
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return torch.cat([x * cos_T1R + turned * sin_T1R, rest], -1)


class _Rotate(torch.autograd.Function):
    """The same in four passes; the gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    half = size // 2
    out = torch.empty_like(x)
    torch.mul(x[..., :size], cos, out=out[..., :size])
    out[..., :half].addcmul_(x[..., half:size], sin[..., :half], value=-1)
    out[..., half:size].addcmul_(x[..., :half], sin[..., half:])
    if size < x.shape[-1]:
        out[..., size:] = x[..., size:]
    return out


def rotate(x_THD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """Return x_THD with the first R entries of each head rotated; same shape and dtype.

    cos and sin are in x's dtype and take no gradient.
    """
    result: Tensor = _Rotate.apply(x_THD, cos_T1R, sin_T1R)
    return result
