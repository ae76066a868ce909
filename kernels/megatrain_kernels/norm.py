"""RMSNorm and LayerNorm as Transformer Engine defines them.  Statistics are in float32."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False) -> Tensor:
    """Return x / rms(x) * weight over the last dimension, in x's dtype.

    With `zero_centered` the factor is 1 + weight.  Source: Zhang and Sennrich, arXiv:1910.07467.
    The product with the weight is taken in float32, as in Transformer Engine; Transformers rounds
    to x's dtype before it, which is the same in float32.
    """
    scale = weight.float() + 1.0 if zero_centered else weight.float()
    return torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), scale, eps).to(x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, zero_centered: bool = False
) -> Tensor:
    """Return the layer norm of x over the last dimension, in x's dtype."""
    scale = weight.float() + 1.0 if zero_centered else weight.float()
    shift = None if bias is None else bias.float()
    return torch.nn.functional.layer_norm(x.float(), (x.shape[-1],), scale, shift, eps).to(x.dtype)
