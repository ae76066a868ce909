"""From the decoder's hidden states to log-probabilities of the labels, without whole logits."""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatrain.model.lora_linear import LoraLinear
from megatrain.model.microbatch import MicroBatch
from megatrain_kernels.logprobs import frozen_head_logprobs, logprobs


class LogprobHead:
    """GPTModel's output processor: hidden states in, log-probabilities of N labels out."""

    def __init__(self, vocab_size: int, tp_group: Any) -> None:
        self.vocab_size, self.tp_group = vocab_size, tp_group
        self.lora: LoraLinear | None = None
        """Factors of the active adapter on the output layer, if it has any."""

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: MicroBatch,
        **kwargs: Any,
    ) -> Tensor:
        """Return float32 (N,).  Collective over TP."""
        hidden = hidden_states
        if self.tp_group.size() > 1:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        hidden = hidden.squeeze(1).index_select(0, context.label_index_N)
        weight = output_layer.weight if output_weight is None else output_weight
        bias, lora = output_layer.bias, self.lora
        first = self.tp_group.rank() * weight.shape[0]
        shard = {
            "first_row": first,
            "num_real": max(0, min(weight.shape[0], self.vocab_size - first)),
            "group": self.tp_group,
        }
        if lora is None and bias is None and not weight.requires_grad:
            return frozen_head_logprobs(hidden, weight, context.targets_N, **shard)

        def logits_of(h: Tensor) -> Tensor:
            logits = torch.nn.functional.linear(h, weight, bias)
            return logits if lora is None else logits + lora.local(h)

        return logprobs(hidden, logits_of, context.targets_N, num_rows=weight.shape[0], **shard)
