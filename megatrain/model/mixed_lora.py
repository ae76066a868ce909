"""What the factors of several adapters on one Megatron linear add to its output, in one go.

Shapes as in lora_linear.py; W is the width of h: the largest sum of ranks of any adapter here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatrain.model.lora_linear import EmbeddingLora, GroupedLoraLinear, LoraLinear
from megatrain.model.mixture import Mixture
from megatrain_kernels.multi_lora import expand, shrink


def mixed(factors: Any, mixture: Mixture, expert_ids_T: Tensor | None) -> "MixedLora | None":
    """Return the factors of a mixture's adapters on a linear; None if none of them has any."""
    known = dict(factors.items())
    linears = [known.get(name) for name in mixture.names]
    if all(linear is None for linear in linears):
        return None
    return MixedLora(linears, mixture, expert_ids_T)


class MixedLora:
    """The factors of the adapters of one micro-batch on one linear."""

    def __init__(
        self,
        linears: Sequence[LoraLinear | None],
        mixture: Mixture,
        expert_ids_T: Tensor | None = None,
    ) -> None:
        self.linears, self.mixture, self._expert_ids_T = linears, mixture, expert_ids_T
        there = [linear for linear in linears if linear is not None]
        self.shape = there[0].shape
        self.width = max(sum(part.rank for part in linear.parts) for linear in there)

    def _counts(self, rows: Tensor) -> tuple[int, ...]:
        return self.mixture.counts_of(len(rows), self.shape.tp_group.rank())

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the linear's output (T, 1, O) plus each token's own delta.  Collective over TP."""
        x_TI = x.flatten(0, -2)
        factors = [None if each is None else each.fused_a() for each in self.linears]
        h_TW = self._over_tp(shrink(x_TI, factors, self._counts(x_TI), self.width))
        return self._expand(out.flatten(0, -2), h_TW).view_as(out)

    def _expand(self, out_TO: Tensor, h_TW: Tensor) -> Tensor:
        factors = [None if each is None else each.fused_b() for each in self.linears]
        return expand(out_TO, h_TW, factors, self._counts(h_TW))

    def _over_tp(self, h_TW: Tensor) -> Tensor:
        shape = self.shape
        if shape.sequence_parallel and shape.kind == "column":
            return gather_from_sequence_parallel_region(h_TW, group=shape.tp_group)
        if shape.sequence_parallel and shape.kind in ("row", "embedding"):
            return reduce_scatter_to_sequence_parallel_region(h_TW, group=shape.tp_group)
        return h_TW

    def add_to_embedding(self, ids_1T: Tensor, out: Tensor) -> Tensor:
        """Return embeddings (1, T, O), or (T/t, 1, O) split over TP, plus deltas.  Collective."""
        runs = ids_1T.split(list(self.mixture.counts), 1)
        parts = []
        for linear, ids in zip(self.linears, runs, strict=True):
            size = ids.shape[1]
            if isinstance(linear, EmbeddingLora):
                h = linear.look_up(ids).squeeze(0)
            else:
                h = out.new_zeros(size, 0)
            parts.append(torch.nn.functional.pad(h, (0, self.width - h.shape[1])))
        h_TW = self._over_tp(torch.cat(parts).contiguous())
        return self._expand(out.flatten(0, -2), h_TW).view_as(out)

    def add_to_experts(self, x: Tensor, out: Tensor, counts: Sequence[int]) -> Tensor:
        """Return experts' output (T, O) plus deltas, for tokens sorted by expert."""
        ids = self._expert_ids_T
        assert ids is not None
        experts = torch.repeat_interleave(
            torch.arange(len(counts), device=x.device),
            torch.as_tensor([int(count) for count in counts], device=x.device),
        )
        group_T = experts * len(self.linears) + ids.to(torch.int64)
        order = group_T.argsort(stable=True)
        runs = group_T.bincount(minlength=len(counts) * len(self.linears)).tolist()
        a, b = self._of_experts(len(counts))
        h_TW = shrink(x.index_select(0, order), a, runs, self.width)
        mixed_out = expand(out.index_select(0, order), h_TW, b, runs)
        return mixed_out.index_select(0, order.argsort())

    def _of_experts(self, num_experts: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return A (S, I) and B (O, S) for each expert and, faster, each adapter."""
        a: list[Sequence[Tensor | None]] = []
        b: list[Sequence[Tensor | None]] = []
        for linear in self.linears:
            if isinstance(linear, GroupedLoraLinear):
                a.append(linear.experts_a().unbind())
                b.append(linear.experts_b().unbind())
            else:
                a.append([None] * num_experts)
                b.append([None] * num_experts)
        experts = range(num_experts)
        return [each[e] for e in experts for each in a], [each[e] for e in experts for each in b]
