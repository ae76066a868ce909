"""What families of today's decoders have in common, set on Bridge's provider."""

from typing import Any


def set_decoder(provider: Any) -> None:
    """Set RMSNorm, a gated MLP, rotary positions, and no bias nor dropout."""
    provider.normalization = "RMSNorm"
    provider.gated_linear_unit = True
    provider.position_embedding_type = "rope"
    provider.add_bias_linear = False
    provider.add_qkv_bias = False
    provider.hidden_dropout = 0.0
    provider.attention_dropout = 0.0


def set_experts(provider: Any, *, is_normalized: bool) -> None:
    """Set dropless experts behind a softmax over all of them.

    `is_normalized`: the chosen experts' probabilities are divided by their sum.
    """
    provider.moe_grouped_gemm = True
    provider.moe_router_score_function = "softmax"
    provider.moe_router_pre_softmax = not is_normalized
    provider.moe_token_dispatcher_type = "alltoall"


def set_window(provider: Any, config: Any) -> None:
    """Set the window of attention: Megatron counts the keys before the query."""
    window = getattr(config, "sliding_window", None)
    provider.window_size = None if not window else (window - 1, 0)
