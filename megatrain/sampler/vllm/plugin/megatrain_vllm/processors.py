"""What vLLM 0.32 lacks on processors, in plain torch: to develop and to test, not for speed.

- With LoRA experts run by a Triton kernel, which processors do not have.
- The router leaves out a bias that corrects the choice of experts, and scores by sigmoid.
- The rotary kernel turns a slice of another tensor, as latent attention gives it, wrongly.

`install` replaces these.  Which factors belong to which expert stays vLLM's own code.

T rows of an expert, I columns of w2, H hidden; A (R, in), B (out, R) of one slot and expert.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


def install() -> None:
    """Let models that are loaded from now on, with LoRA enabled, use what is here."""
    select = unquantized_fused_moe_method.select_unquantized_moe_backend

    def choose(moe_config: Any) -> Any:
        if not moe_config.is_lora_enabled:
            return select(moe_config)
        return UnquantizedMoeBackend.CPU, TorchExperts

    unquantized_fused_moe_method.select_unquantized_moe_backend = choose
    route = CPURouter._compute_routing

    def compute(router: Any, states: Tensor, logits: Tensor, *others: Any, **more: Any) -> Any:
        biased = router.e_score_correction_bias is not None or router.scoring_func == "sigmoid"
        if biased and not router.use_grouped_topk and router.custom_routing_function is None:
            return chosen(router, logits)
        return route(router, states, logits, *others, **more)

    CPURouter._compute_routing = compute
    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native


def chosen(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights and numbers of the best experts by score and bias, as on other devices."""
    scores = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}[router.scoring_func](
        logits.float()
    )
    bias = router.e_score_correction_bias
    best = (scores if bias is None else scores + bias).topk(router.top_k, -1).indices
    weights = scores.gather(-1, best)
    if router.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * router.routed_scaling_factor, best.to(torch.int32)


class TorchExperts(LoRAExpertsMixin, CPUUnquantizedExperts):
    """Experts one by one, each with its adapter's factors."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leave the weights as they are: no layout of a kernel."""
        self._use_zentorch = False

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        *others: Any,
        **more: Any,
    ) -> None:
        """Write the weighted sum of the chosen experts to `output`."""
        context: Any = self._lora_context
        result = torch.zeros_like(hidden_states)
        slots = torch.full((len(hidden_states),), -1)
        if context is not None and not context.punica_wrapper.no_lora:
            slots = context.punica_wrapper.token_lora_indices[: len(hidden_states)]
        for expert in topk_ids.unique().tolist():
            for slot in slots.unique().tolist():
                rows, places = ((topk_ids == expert) & (slots == slot)[:, None]).nonzero(
                    as_tuple=True
                )
                if not len(rows):
                    continue
                x = hidden_states[rows]
                hidden = _linear(x, w1[expert], self.w1_bias, expert)
                if slot >= 0:
                    pairs = zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True)
                    hidden += torch.cat([_delta(x, *pair, slot, expert) for pair in pairs], -1)
                hidden = _activated(hidden, activation.value)
                y = _linear(hidden, w2[expert], self.w2_bias, expert)
                if slot >= 0:
                    pair = context.w2_lora_a_stacked[0], context.w2_lora_b_stacked[0]
                    y += _delta(hidden, *pair, slot, expert)
                result.index_add_(0, rows, y * topk_weights[rows, places, None].to(y.dtype))
        output.copy_(result)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    y = x @ weight.T
    return y if bias is None else y + bias[expert]


def _delta(x: Tensor, a: Tensor, b: Tensor, slot: int, expert: int) -> Tensor:
    return x @ a[slot, expert].T @ b[slot, expert].T


def _activated(hidden: Tensor, name: str) -> Tensor:
    if name == "silu":
        gate, up = hidden.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    assert name == "swigluoai", name
    gate, up = hidden[:, ::2].clamp(max=7), hidden[:, 1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)
