"""Linears that Megatron-Core has only in Transformer Engine: replicated, and one per expert."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.grouped import grouped_linear
from megatrain_kernels.torch_backend.grouped_checkpoint import sharded_experts
from megatrain_kernels.torch_backend.norms import _current_device


def _weight(rows: int, columns: int | None, config: Any, init_method: Any) -> torch.nn.Parameter:
    device = "cpu" if config.use_cpu_initialization else _current_device()
    shape = (rows,) if columns is None else (rows, columns)
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
    if config.perform_initialization and columns is not None:
        with torch.no_grad():
            init_method(parameter)
    return parameter


class TorchLinear(torch.nn.Module):
    """Transformer Engine's Linear with parallel_mode "duplicated": the same on every TP rank."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Any = None,
        bias: bool = False,
        skip_bias_add: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.config, self.skip_bias_add = config, skip_bias_add
        self.tensor_model_parallel = False
        self.weight = _weight(output_size, input_size, config, init_method)
        self.bias = _weight(output_size, None, config, None) if bias else None
        parameter: Any
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x W^T and the bias if that is to be added later."""
        if self.skip_bias_add:
            return torch.nn.functional.linear(x, self.weight), self.bias
        return torch.nn.functional.linear(x, self.weight, self.bias), None


class _TorchGroupedLinear(torch.nn.Module):
    """Weights `weight0`, `weight1`, ... of the experts on this rank, split over expert TP."""

    partition_dim: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Any = None,
        bias: bool,
        skip_bias_add: bool,
        pg_collection: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.num_gemms, self.use_bias, self.skip_bias_add = num_gemms, bias, skip_bias_add
        self.config, self.tp_group = config, pg_collection.expt_tp
        self._groups = pg_collection
        size = self.tp_group.size()
        rows, columns = output_size, input_size
        if self.partition_dim == 0:
            rows //= size
        else:
            columns //= size
        for index in range(num_gemms):
            self._register(f"weight{index}", _weight(rows, columns, config, init_method))
            if bias:
                self._register(f"bias{index}", _weight(rows, None, config, None))

    def _register(self, name: str, parameter: Any) -> None:
        parameter.allreduce = False  # Megatron's mark for an expert's parameter
        parameter.tensor_model_parallel = True
        parameter.partition_dim = self.partition_dim
        self.register_parameter(name, parameter)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return Megatron's description of each expert's tensors in a distributed checkpoint."""
        return sharded_experts(self, self._groups, prefix, sharded_offsets, metadata)

    def forward(self, x: Tensor, m_splits: Sequence[int]) -> tuple[Tensor, list[Tensor] | None]:
        """Return every expert's product over its tokens, and biases if they are added later."""
        counts = [int(count) for count in m_splits]
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        out = grouped_linear(x, weights, counts)
        if not self.use_bias:
            return out, None
        biases = [getattr(self, f"bias{index}") for index in range(self.num_gemms)]
        if self.skip_bias_add:
            return out, biases
        repeats = torch.tensor(counts, device=x.device)
        return out + torch.stack(biases).repeat_interleave(repeats, 0), None


class TorchColumnParallelGroupedLinear(_TorchGroupedLinear):
    """Experts' first linear: out-features split over expert TP."""

    partition_dim = 0


class TorchRowParallelGroupedLinear(_TorchGroupedLinear):
    """Experts' second linear: in-features split over expert TP; the dispatcher sums the parts."""

    partition_dim = 1
