"""Causal convolution of each channel over packed sequences, and the norm of queries and keys.

T tokens, D channels, W width of the convolution.
"""

import torch
from torch import Tensor


def causal_conv_reference(
    x_TD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, lengths: list[int]
) -> Tensor:
    """Return sum_i weight[:, i] x[t - W + 1 + i] + bias, sequence by sequence: the definition."""
    width = weight_DW.shape[1]
    out = []
    for x_SD in x_TD.split(lengths):
        padded = torch.cat([x_SD.new_zeros(width - 1, x_SD.shape[1]), x_SD])
        y_SD = torch.nn.functional.conv1d(
            padded.T[None], weight_DW[:, None], bias_D, groups=weight_DW.shape[0]
        )[0].T
        out.append(y_SD)
    return torch.cat(out)


def causal_conv(
    x_TD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, lengths: list[int]
) -> Tensor:
    """Return the same for all sequences at once: W shifted products, masked at their beginnings."""
    position_T = torch.cat([torch.arange(n, device=x_TD.device) for n in lengths])
    width = weight_DW.shape[1]
    out_TD = x_TD * weight_DW[:, -1]
    for back in range(1, min(width, x_TD.shape[0])):
        shifted = torch.nn.functional.pad(x_TD[:-back], (0, 0, back, 0))
        seen = (position_T >= back)[:, None]
        out_TD = out_TD + torch.where(seen, shifted, 0) * weight_DW[:, -1 - back]
    return out_TD if bias_D is None else out_TD + bias_D


def l2_norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Return x / sqrt(sum x^2 + eps) over the last dimension, worked out in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
