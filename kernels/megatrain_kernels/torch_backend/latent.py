"""Norms of latent attention: which there are, and their epsilon."""

from typing import Any

from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver

from megatrain_kernels.torch_backend.norms import TorchLayerNormColumnParallelLinear

EPSILON = 1e-6
"""Of the norms of latents, whatever `rms_norm_eps` is: so in DeepSeek's own code and in
Transformers.  It matters for GLM-4.7-Flash, whose rms_norm_eps is 1e-5."""


class TorchLatentLayerNormColumnParallelLinear(TorchLayerNormColumnParallelLinear):
    """The norm of a latent and the linear that follows it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = EPSILON


class TorchQKNormConfigResolver(QKNormConfigResolver):
    """Megatron's own choice, save for models without `q_lora_rank` (DeepSeek-V2-Lite).

    There Megatron-Core 0.19 fuses a norm with `linear_q_proj`, although its input is normed
    already and no checkpoint has a weight for it.
    """

    def _resolve_mla_qk_layernorm(self) -> Any:
        result: Any = super()._resolve_mla_qk_layernorm()
        if not self.has_q_lora:
            result["linear_q_proj"] = self.submodules.linear_q_proj or self.linear_impl
        for name in ("linear_q_up_proj", "linear_kv_up_proj"):
            if result[name] is TorchLayerNormColumnParallelLinear:
                result[name] = TorchLatentLayerNormColumnParallelLinear
        return result
