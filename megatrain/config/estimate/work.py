"""How much arithmetic a batch is: what MFU is measured against.  Arithmetic only, no torch.

Forward: 2 FLOPs per token for each matrix weight that the token meets, and causal attention.
Backward through a frozen base: 2 FLOPs again, for input gradients only; attention has no weights,
so its backward is twice its forward.  That is 4 N_active per token and attention for LoRA, where
full training has 6 N_active.  The adapters' own arithmetic, norms, and what checkpointing computes
again are not counted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.config.estimate.linears import embedding, head, layer_linears
from megatrain.config.estimate.model import ModelShape

EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Work:
    """What decides how much arithmetic a token needs."""

    total_parameters: int
    active_parameters: int
    """Matrix weights that one token meets: head yes, looked-up embedding no, top-k experts only."""
    attention_width: float
    """Query heads times head size, summed over the layers with softmax attention."""

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> "Work":
        """Count a Hugging Face checkpoint from its tensors' shapes and its configuration."""
        num_experts = config.get("num_experts") or config.get("num_local_experts")
        share = config["num_experts_per_tok"] / num_experts if num_experts else 1.0
        active = 0.0
        for name, shape in shapes.items():
            if len(shape) < 2 or (name.endswith(EMBEDDING) and not config["tie_word_embeddings"]):
                continue
            active += math.prod(shape) * (share if ".experts." in name else 1.0)
        layers = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            total_parameters=sum(math.prod(shape) for shape in shapes.values()),
            active_parameters=round(active),
            attention_width=heads * head_dim * sum(kind != "linear_attention" for kind in layers),
        )

    @classmethod
    def of_shape(cls, shape: ModelShape, *, with_head: bool = True) -> "Work":
        """Count a model from its sizes alone; a reward model has no output layer."""
        whole = [linear for i in range(shape.layers) for linear in layer_linears(shape, i)]
        ends = embedding(shape).total * (1 if shape.tied else 2) + shape.hidden
        active = float(head(shape).total) if with_head else 0.0
        for linear in whole:
            if linear.kind != "norm":
                experts = shape.experts
                share = experts.per_token / experts.count if linear.is_expert and experts else 1.0
                active += share * linear.copies * linear.rows * linear.columns
        total = ends + sum(linear.total for linear in whole)
        return cls(total, round(active), shape.attention_width)

    def forward_flops(self, lengths: Sequence[int]) -> float:
        """Return the FLOPs of a forward pass over these sequences."""
        # q k^T and p v are 2 S^2 width each; causal attention needs half of both.
        return self._sum(sum(lengths), _squares(lengths), linear=2.0, attention=2.0)

    def lora_flops(self, lengths: Sequence[int]) -> float:
        """Return the FLOPs of forward and backward with a frozen base."""
        return self.train_flops(lengths, is_frozen=True)

    def full_flops(self, lengths: Sequence[int]) -> float:
        """Return the FLOPs of forward and backward when all parameters are trained."""
        return self.train_flops(lengths, is_frozen=False)

    def train_flops(self, lengths: Sequence[int], *, is_frozen: bool) -> float:
        """Return the FLOPs of forward and backward."""
        return self.flops_of(sum(lengths), _squares(lengths), is_frozen=is_frozen)

    def flops_of(self, tokens: float, squares: float, *, is_frozen: bool) -> float:
        """Return the same from the sum of the lengths and of their squares."""
        # Attention has no weights to freeze: its backward is twice its forward.
        linear = 4.0 if is_frozen else 6.0
        return self._sum(tokens, squares, linear=linear, attention=6.0)

    def _sum(self, tokens: float, squares: float, *, linear: float, attention: float) -> float:
        return linear * self.active_parameters * tokens + attention * self.attention_width * squares


def _squares(lengths: Sequence[int]) -> float:
    return sum(length * length for length in lengths)
