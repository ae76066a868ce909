"""Core attention of Gemma: which layers have a window, and soft-capped logits."""

import copy
import math
from typing import Any

from megatrain_kernels.torch_backend.core_attention import TorchCoreAttention


class TorchGemma2Attention(TorchCoreAttention):
    """Bridge's Gemma2FlexDotProductAttention: a window on odd layers, a cap on all."""

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        own = copy.copy(config)
        if layer_number % 2 == 0:
            own.window_size = None
        kwargs["softmax_scale"] = 1 / math.sqrt(config.query_pre_attn_scalar)
        super().__init__(own, layer_number, *args, **kwargs)
        self.softcap = config.attn_logit_softcapping or None


class TorchGemma3Attention(TorchCoreAttention):
    """Bridge's Gemma3TEDotProductAttention: a window on all but each last layer of a pattern."""

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        own = copy.copy(config)
        is_local = layer_number % sum(config.interleaved_attn_pattern) != 0
        own.window_size = (config.window_size - 1, 0) if is_local else None
        super().__init__(own, layer_number, *args, **kwargs)
