"""LoRA on Qwen3-MoE's experts in plain torch: one pair of factors per expert and linear."""

import torch
from torch import Tensor, nn

LEAVES = ("gate_proj", "up_proj", "down_proj")


class LoraExperts(nn.Module):
    """Transformers' fused experts, run one by one, each linear with factors of its own."""

    def __init__(self, experts: nn.Module, prefix: str, factors: dict[str, Tensor], scale: float):
        super().__init__()
        gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
        weights = dict(zip(LEAVES, (gate, up, experts.down_proj.detach()), strict=True))
        self.weights = {
            f"{prefix}.{e}.{leaf}": weight[e]
            for leaf, weight in weights.items()
            for e in range(len(weight))
        }
        self.prefix, self.scale, self.num_experts = prefix, scale, len(gate)
        self.factors = {
            name: nn.Parameter(factors[name].clone())
            for module in self.weights
            for name in (f"{module}.lora_A", f"{module}.lora_B")
            if name in factors
        }

    def _linear(self, expert: int, leaf: str, x: Tensor) -> Tensor:
        name = f"{self.prefix}.{expert}.{leaf}"
        out = x @ self.weights[name].T
        if f"{name}.lora_A" in self.factors:
            a, b = self.factors[f"{name}.lora_A"], self.factors[f"{name}.lora_B"]
            out = out + self.scale * (x @ a.T) @ b.T
        return out

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum over each token's experts, as Transformers' experts do."""
        result = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            tokens, slot = (top_k_index == expert).nonzero(as_tuple=True)
            x = hidden[tokens]
            inner = nn.functional.silu(self._linear(expert, "gate_proj", x))
            inner = inner * self._linear(expert, "up_proj", x)
            out = self._linear(expert, "down_proj", inner) * top_k_weights[tokens, slot, None]
            result = result.index_add(0, tokens, out)
        return result


def add_expert_lora(
    model: nn.Module, factors: dict[str, Tensor], *, scale: float
) -> dict[str, nn.Parameter]:
    """Put these factors on the experts of a Transformers model; return them by name."""
    model.requires_grad_(False)
    trained: dict[str, nn.Parameter] = {}
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}.mlp.experts"
        layer.mlp.experts = LoraExperts(layer.mlp.experts, prefix, factors, scale)
        trained |= layer.mlp.experts.factors
    assert trained.keys() == factors.keys()
    return trained
