"""Norms, alone and fused with the column-parallel linear that follows them."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from megatrain_kernels.norm import layer_norm, rms_norm


def _parameter(size: int, value: float, config: Any) -> torch.nn.Parameter:
    device = "cpu" if config.use_cpu_initialization else _current_device()
    data = torch.full((size,), value, dtype=config.params_dtype, device=device)
    parameter: Any = torch.nn.Parameter(data)
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


def _current_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _normalize(x: Tensor, weight: Tensor, bias: Tensor | None, config: Any, eps: float) -> Tensor:
    zero_centered = config.layernorm_zero_centered_gamma
    if config.normalization == "RMSNorm":
        return rms_norm(x, weight, eps=eps, zero_centered=zero_centered)
    return layer_norm(x, weight, bias, eps=eps, zero_centered=zero_centered)


class TorchNorm(torch.nn.Module):
    """Transformer Engine's norm: `weight`, and `bias` for LayerNorm."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        self.weight = _parameter(
            hidden_size, float(not config.layernorm_zero_centered_gamma), config
        )
        has_bias = config.normalization == "LayerNorm"
        self.bias = _parameter(hidden_size, 0.0, config) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x, same shape and dtype."""
        return _normalize(x, self.weight, self.bias, self.config, self.eps)


class TorchLayerNormColumnParallelLinear(ColumnParallelLinear):
    """Norm, then a column-parallel linear: Transformer Engine's LayerNormLinear.

    With `return_layernorm_output` the result is ((output, normed input), bias), as there.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Any,
        gather_output: bool = False,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool = False,
        stride: int = 1,
        tp_group: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            gather_output=gather_output,
            bias=bias,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            stride=stride,
            tp_group=tp_group,
        )
        one = float(not config.layernorm_zero_centered_gamma)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = _parameter(input_size, one, config)
        has_bias = config.normalization == "LayerNorm"
        self.layer_norm_bias = _parameter(input_size, 0.0, config) if has_bias else None
        self.return_layernorm_output = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
        """Return the linear's output and its bias if that is to be added later."""
        normed = _normalize(x, self.layer_norm_weight, self.layer_norm_bias, self.config, self.eps)
        out, bias = super().forward(normed, *args, **kwargs)
        return ((out, normed), bias) if self.return_layernorm_output else (out, bias)
