"""A row-parallel linear with a norm behind it: Gemma 2 and 3, GLM-4, EXAONE 4."""

from typing import Any

from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor

from megatrain_kernels.torch_backend.norms import TorchNorm


class TorchRowParallelLinearLayerNorm(RowParallelLinear):
    """Bridge's TERowParallelLinearLayerNorm: the norm sees the sum over TP ranks."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = TorchNorm(config, output_size, eps=config.layernorm_epsilon)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the normed output.

        The norm comes after forward hooks: an adapter adds its delta in one, to what is normed.
        """
        output, bias = super().__call__(*args, **kwargs)
        if bias is not None:
            raise ValueError("a linear with a norm behind it takes no bias that is added later")
        return self.post_layernorm(output), None
