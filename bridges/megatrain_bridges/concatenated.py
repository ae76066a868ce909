"""A gate and an up projection that Hugging Face holds in one tensor, the gate's rows first.

On each tensor parallel rank Megatron wants the gate's rows of that rank, then the up projection's.
"""

from typing import Any

import torch
from megatron.bridge.models.conversion.param_mapping import GatedMLPMapping, MegatronParamMapping


class ConcatenatedGatedMLPMapping(MegatronParamMapping[torch.Tensor]):
    """`gate_up_proj` (2 * F, H) and Megatron's first linear of a gated MLP."""

    def __init__(self, megatron_param: str, hf_param: str) -> None:
        super().__init__(megatron_param, hf_param)
        self._gated = GatedMLPMapping(megatron_param, gate=f"{hf_param}.0", up=f"{hf_param}.1")

    def hf_to_megatron(self, hf_weights: torch.Tensor, megatron_module: Any) -> torch.Tensor:
        """Return this rank's rows.  Collective over TP."""
        gate, up = hf_weights.chunk(2)
        return self._gated.hf_to_megatron({"gate": gate, "up": up}, megatron_module)

    def megatron_to_hf(
        self, megatron_weights: torch.Tensor | None, megatron_module: Any
    ) -> dict[str, torch.Tensor]:
        """Return the whole tensor.  Collective over TP and PP."""
        both = self._gated.megatron_to_hf(megatron_weights, megatron_module)
        if not both:
            return {}
        halves = [both[str(self._gated.hf_param[part])] for part in ("gate", "up")]
        return {str(self.hf_param): torch.cat(halves)}

    def resolve(self, captures: tuple[str, ...]) -> "ConcatenatedGatedMLPMapping":
        """Return the mapping of one layer."""
        return type(self)(*self._resolve_names(captures))
