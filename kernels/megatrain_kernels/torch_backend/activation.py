"""Megatron's fused SwiGLU functions, in plain torch."""

from torch import Tensor

from megatrain_kernels.swiglu import swiglu


def bias_swiglu_impl(
    input: Tensor,
    bias: Tensor | None,
    fp8_input_store: bool = False,
    cpu_offload_input: bool = False,
) -> Tensor:
    """Return the SwiGLU of input + bias."""
    return swiglu(input if bias is None else input + bias)


def weighted_bias_swiglu_impl(
    input: Tensor, bias: Tensor | None, weights: Tensor, fp8_input_store: bool = False
) -> Tensor:
    """Return the SwiGLU of input + bias times a weight for each token, in input's dtype."""
    return (bias_swiglu_impl(input, bias) * weights).to(input.dtype)
