"""From the decoder's hidden states to what a loss needs, without whole logits."""

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatrain.model.lora_linear import LoraLinear
from megatrain.model.microbatch import MicroBatch
from megatrain.model.mixture import Mixture
from megatrain_kernels.logprobs import frozen_head_logprobs, logprobs, soft_cap


class Head:
    """GPTModel's output processor: hidden states in, rows of numbers for N labels out.

    Row 0 is the label's log-probability, row 1 is 1 where no token is likelier, further rows are
    the log-probabilities of `extra_targets_NK`.  With a score head, row 0 alone: the score.
    """

    def __init__(self, vocab_size: int, tp_group: Any) -> None:
        self.vocab_size, self.tp_group = vocab_size, tp_group
        self.lora: LoraLinear | None = None
        """Factors of the active adapter on the output layer, if it has any."""
        self.loras: Mapping[str, LoraLinear | None] = {}
        """The same of each adapter, for micro-batches of several."""
        self.score_1H: Tensor | None = None
        """Weight of the score head; None for log-probabilities."""

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: MicroBatch,
        config: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return float32 (R, N).  Collective over TP."""
        hidden = hidden_states
        if self.tp_group.size() > 1:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        hidden = hidden.squeeze(1).index_select(0, context.label_index_N)
        if self.score_1H is not None:
            return self._scores(hidden, self.score_1H)
        weight = output_layer.weight if output_weight is None else output_weight
        # Other converters' configurations lack it, and are refused for models that have a cap.
        cap: float | None = getattr(config, "final_logit_softcapping", None)
        first = self.tp_group.rank() * weight.shape[0]
        shard = {
            "first_row": first,
            "num_real": max(0, min(weight.shape[0], self.vocab_size - first)),
            "group": self.tp_group,
        }
        output = _Output(weight, output_layer.bias, cap, shard)
        if context.mixture is None:
            return output(hidden, context.targets_N, self.lora, context.extra_targets_NK)
        return self._mixed(output, hidden, context.targets_N, context.mixture)

    def _mixed(
        self, output: "_Output", hidden_NH: Tensor, targets_N: Tensor, mixture: Mixture
    ) -> Tensor:
        """Return the rows of labels that are several adapters'."""
        loras = [self.loras.get(name) for name in mixture.names]
        rows, begin = [], 0
        runs = zip(loras, mixture.label_counts, strict=True)
        for lora, run in itertools.groupby(runs, key=operator.itemgetter(0)):
            end = begin + sum(count for _, count in run)
            if end > begin:
                rows.append(output(hidden_NH[begin:end], targets_N[begin:end], lora, None))
            begin = end
        return torch.cat(rows, 1)

    def _scores(self, hidden_NH: Tensor, score_1H: Tensor) -> Tensor:
        """Return h . w, float32 (1, N).

        Every TP rank computes all of it, and gradients are summed over TP afterwards: only the
        first one's counts.
        """
        scores = torch.nn.functional.linear(hidden_NH.float(), score_1H.float()).T
        return scores if self.tp_group.rank() == 0 else scores.detach() + 0.0 * scores


@dataclass(frozen=True, slots=True)
class _Output:
    """The output layer of one micro-batch."""

    weight: Tensor
    bias: Tensor | None
    cap: float | None
    shard: dict[str, Any]
    """Where this rank's rows are in the vocabulary, as the kernels want it."""

    def __call__(
        self, hidden_NH: Tensor, targets_N: Tensor, lora: LoraLinear | None, extra: Tensor | None
    ) -> Tensor:
        """Return float32 (R, N).  Collective over TP."""
        weight, bias, cap = self.weight, self.bias, self.cap
        if lora is None and bias is None and not weight.requires_grad and extra is None:
            logps, is_top = frozen_head_logprobs(
                hidden_NH, weight, targets_N, cap=cap, **self.shard
            )
            return torch.stack([logps, is_top.float()])

        def logits_of(h: Tensor) -> Tensor:
            logits = torch.nn.functional.linear(h, weight, bias)
            logits = logits if lora is None else logits + lora.local(h)
            return logits if cap is None else soft_cap(logits, cap)

        targets = targets_N.unsqueeze(1)
        if extra is not None:
            targets = torch.cat([targets, extra], 1)
        rows = weight.shape[0]
        logps_NK, is_top = logprobs(hidden_NH, logits_of, targets, num_rows=rows, **self.shard)
        return torch.cat([logps_NK[:, :1].T, is_top.float().unsqueeze(0), logps_NK[:, 1:].T])
