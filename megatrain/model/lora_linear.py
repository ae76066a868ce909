"""LoRA factors on one Megatron linear, and what they add to its output.

T tokens, I in-features on this rank, O out-features on this rank, R the rank of one part, S the
sum of ranks over the parts of a fused linear (q, k, v; gate, up), t the TP size, E local experts.

               A of a part      B of a part       gradient also summed over TP
  column       (R, I)           (rows here, R)    A
  row          (R, I/t)         (O, R)            B
  replicated   (R, I)           (O, R)            A and B (tokens are split by sequence parallelism)
  embedding    (R, I/t)         (O, R)            B   (I is the vocabulary)

Column: h = x A^T on this rank's tokens, gathered over TP (small), then B.  Row: h is a partial sum,
reduce-scattered over TP, then B.  Experts: no communication here; the token dispatcher sums over
expert TP, so the factor that is the same on all of those ranks gets a partial gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megatrain_kernels.grouped import grouped_linear


@dataclass(frozen=True, slots=True)
class LoraPart:
    """One Hugging Face linear inside a Megatron linear."""

    hf_modules: tuple[str, ...]
    """Its name; for experts, one name for each expert on this rank."""
    rank: int
    scale: float
    rows: Tensor
    """For each row of B here, its row in the Hugging Face linear (int64)."""
    places: Tensor
    """Where those rows are in the Megatron linear's local output (int64)."""
    out_features: int
    """Rows of the whole Hugging Face linear."""


@dataclass(frozen=True, slots=True)
class LinearShape:
    """How a Megatron linear is split, as far as LoRA must know it."""

    kind: str
    """column, row, replicated or embedding."""
    is_expert: bool
    in_features: int
    """On this rank."""
    out_features: int
    """On this rank."""
    tp_group: Any
    """Ranks that hold the other slices (expert TP for experts)."""
    sequence_parallel: bool
    total_in_features: int
    """Of the whole linear, without padding; an embedding's are its vocabulary."""

    def is_split(self, letter: str) -> bool:
        """Tell whether factor A or B is split over the tensor parallel ranks."""
        return (self.kind, letter) in (("column", "B"), ("row", "A"), ("embedding", "A"))


class LoraLinear(torch.nn.Module):
    """The factors of one adapter on one linear."""

    def __init__(
        self, shape: LinearShape, parts: Sequence[LoraPart], dropout: float, like: Tensor
    ) -> None:
        super().__init__()
        self.shape, self.parts = shape, tuple(parts)
        experts = (len(parts[0].hf_modules),) if shape.is_expert else ()
        new = lambda *size: torch.nn.Parameter(  # noqa: E731
            torch.zeros(*experts, *size, dtype=like.dtype, device=like.device)
        )
        self.lora_A = torch.nn.ParameterList([new(p.rank, shape.in_features) for p in parts])
        self.lora_B = torch.nn.ParameterList([new(len(p.rows), p.rank) for p in parts])
        self.dropout = torch.nn.Dropout(dropout)
        for index, part in enumerate(parts):
            self.register_buffer(f"places{index}", part.places.to(like.device), persistent=False)
        places = torch.cat([part.places for part in parts])
        self.in_order = torch.equal(places, torch.arange(shape.out_features))

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the linear's output (T, 1, O) plus scale * x A^T B^T.  Collective over TP."""
        shape = self.shape
        h = self._project(x)
        if shape.sequence_parallel and shape.kind == "column":
            h = gather_from_sequence_parallel_region(h, group=shape.tp_group)
        elif shape.sequence_parallel and shape.kind == "row":
            h = reduce_scatter_to_sequence_parallel_region(h, group=shape.tp_group)
        h = h.flatten(0, -2).to(out.dtype)
        return torch.addmm(out.flatten(0, -2), h, self.fused_b().to(out.dtype).T).view_as(out)

    def local(self, x: Tensor) -> Tensor:
        """Return the delta for inputs that are whole on every TP rank.  No communication."""
        return self._project(x) @ self.fused_b().T

    def _drop(self, x: Tensor) -> Tensor:
        """Apply dropout with random numbers of this rank's own."""
        with get_cuda_rng_tracker().fork():
            dropped: Tensor = self.dropout(x)
        return dropped

    def _project(self, x: Tensor) -> Tensor:
        """Return x A^T of all parts side by side, (T, 1, S)."""
        if self.dropout.p and self.training:
            return torch.cat([self._drop(x) @ a.T for a in self.lora_A], -1)
        return x @ self.fused_a().T

    def fused_a(self) -> Tensor:
        """Return A of all parts as one matrix (S, I)."""
        return self.lora_A[0] if len(self.parts) == 1 else torch.cat(list(self.lora_A))

    def fused_b(self) -> Tensor:
        """Return scale * B of all parts as one matrix (O, S), zero where a part has no row."""
        if len(self.parts) == 1 and self.in_order:
            return self.lora_B[0] * self.parts[0].scale
        blocks = []
        for index, (part, b) in enumerate(zip(self.parts, self.lora_B, strict=True)):
            block = b.new_zeros(self.shape.out_features, part.rank)
            blocks.append(block.index_copy(0, getattr(self, f"places{index}"), b * part.scale))
        return torch.cat(blocks, 1)


class EmbeddingLora(LoraLinear):
    """The factors of one adapter on the token embedding: A is looked up, not multiplied."""

    def forward_tokens(self, ids: Tensor) -> Tensor:
        """Return the delta for token ids (1, T): (1, T, O), or (T/t, 1, O) split over TP.

        Collective over TP.
        """
        h = self.look_up(ids)
        if self.shape.sequence_parallel:
            h = reduce_scatter_to_sequence_parallel_region(
                h.transpose(0, 1).contiguous(), group=self.shape.tp_group
            )
        return h @ self.fused_b().T

    def look_up(self, ids: Tensor) -> Tensor:
        """Return h for token ids (1, T): (1, T, S), zero for ids of other TP ranks."""
        rows = ids - self.shape.tp_group.rank() * self.shape.in_features
        here = (rows >= 0) & (rows < self.shape.in_features)
        h = torch.nn.functional.embedding(rows.masked_fill(~here, 0), self.lora_A[0].T)
        return h * here.unsqueeze(-1).to(h.dtype)


class GroupedLoraLinear(LoraLinear):
    """The factors of one adapter on the experts of one layer, one pair for each expert."""

    def forward_experts(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the delta for tokens sorted by expert, (T, O)."""
        counts = [int(count) for count in counts]
        h = self._project_experts(x, counts)
        if self.in_order:
            pieces = h.split([p.rank for p in self.parts], -1)
            out = [
                grouped_linear(piece * part.scale, b.unbind(), counts)
                for piece, part, b in zip(pieces, self.parts, self.lora_B, strict=True)
            ]
            return out[0] if len(out) == 1 else torch.cat(out, -1)
        delta = x.new_zeros(x.shape[0], self.shape.out_features)
        pieces = h.split([p.rank for p in self.parts], -1)
        for index, (piece, part) in enumerate(zip(pieces, self.parts, strict=True)):
            rows = grouped_linear(piece * part.scale, self.lora_B[index].unbind(), counts)
            delta = delta.index_add(1, getattr(self, f"places{index}"), rows)
        return delta

    def _project_experts(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        if self.dropout.p and self.training:
            h = [grouped_linear(self._drop(x), a.unbind(), counts) for a in self.lora_A]
            return torch.cat(h, -1)
        return grouped_linear(x, self.experts_a().unbind(), counts)

    def experts_a(self) -> Tensor:
        """Return A of all parts as one matrix for each expert (E, S, I)."""
        return torch.cat(list(self.lora_A), 1) if len(self.parts) > 1 else self.lora_A[0]

    def experts_b(self) -> Tensor:
        """Return scale * B of all parts as one matrix for each expert (E, O, S)."""
        blocks = []
        for index, (part, b) in enumerate(zip(self.parts, self.lora_B, strict=True)):
            block = b.new_zeros(len(b), self.shape.out_features, part.rank)
            places = getattr(self, f"places{index}")
            blocks.append(block.index_copy(1, places, b * part.scale))
        return torch.cat(blocks, 2)
