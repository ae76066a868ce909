"""From Megatron parameters back to Hugging Face tensors: what loading does, undone.

Rows that loading picks and permutes are put back where they came from; experts of one tensor too.
Where a mapping does more, its own way back is used, without communication: one rank has it all.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.load import runs
from megatrain.checkpoint.names import parallel_kind
from megatrain.checkpoint.safetensors_file import TensorSpec
from megatrain.errors import CheckpointError
from megatrain.model.outline import Outline, StoredParameter

EMBEDDING = "embedding.word_embeddings.weight"


class Inverse:
    """Hugging Face tensors of one rank that holds the whole model, one at a time.

    Args:
        part: that rank's outline; usable while its `with` lasts.
        wanted: shape of every tensor that the checkpoint should have.
        read: gives a parameter's value.
        beside: tensors that Megatron has no place for, kept beside its checkpoint.
    """

    def __init__(
        self,
        part: Outline,
        wanted: Mapping[str, TensorSpec],
        read: Callable[[StoredParameter], Tensor],
        beside: Mapping[str, Tensor],
    ) -> None:
        self._part, self._wanted, self._read, self._beside = part, wanted, read, beside
        self._last: tuple[str, Tensor] | None = None
        self.producers: dict[str, list[StoredParameter]] = defaultdict(list)
        for stored in part.stored:
            names = [n for n in part.table.hf_names(stored.parameter) if n in wanted]
            if not names:
                raise CheckpointError(
                    f"no tensor of the Hugging Face model is made of "
                    f"{stored.parameter.global_name}",
                    hint="the configuration is of another model than the checkpoint",
                )
            for name in names:
                self.producers[name].append(stored)
        self._add_tied_head()

    def _add_tied_head(self) -> None:
        """Let a head that is tied, and in the checkpoint all the same, be the embedding again."""
        found = self.producers.keys() | self._beside.keys()
        rest = [name for name in self._wanted if name not in found]
        if self._part.table.is_tied and rest == ["lm_head.weight"]:
            embedding = next(p for p in self._part.stored if p.parameter.global_name == EMBEDDING)
            self.producers["lm_head.weight"] = [embedding]

    @property
    def names(self) -> list[str]:
        """The tensors that can be had, in the order in which Megatron holds them."""
        return [*self.producers, *(name for name in self._wanted if name in self._beside)]

    def left_out(self) -> list[str]:
        """Return the tensors that cannot be had."""
        return sorted(self._wanted.keys() - set(self.names))

    def value(self, name: str) -> Tensor:
        """Return one tensor.  Raises CheckpointError if its parameters cannot be undone."""
        if name in self._beside:
            return self._beside[name]
        producers = self.producers[name]
        if len(producers) == 1:
            return self._of_one(name, producers[0])
        if not producers[0].parameter.is_expert:
            raise CheckpointError(f"{name} is made of {len(producers)} parameters, in no known way")
        return self._of_experts(name, producers)

    def _parameter(self, stored: StoredParameter) -> Tensor:
        """Return a value; the last one is kept, since q, k and v come one after the other."""
        name = stored.parameter.global_name
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._read(stored))
        return self._last[1]

    def _of_one(self, name: str, stored: StoredParameter) -> Tensor:
        parameter, table = stored.parameter, self._part.table
        value, kind = self._parameter(stored), parallel_kind(stored.parameter)
        if kind == "special":
            return self._by_bridge(name, stored, value)
        if kind != "column":
            return value
        part = next(part for part in table.parts(parameter) if part.hf_name == name)
        pieces = [
            (int(part.rows[start]), value[int(part.places[start]) : int(part.places[stop - 1]) + 1])
            for start, stop in runs(part.rows, part.places)
        ]
        if len(pieces) == 1:
            return pieces[0][1]
        result = value.new_empty(self._wanted[name].shape)
        for first, rows in pieces:
            result[first : first + len(rows)] = rows
        return result

    def _by_bridge(self, name: str, stored: StoredParameter, value: Tensor) -> Tensor:
        mapping: Any = stored.parameter.mapping
        found: dict[str, Tensor] = mapping.megatron_to_hf(value, stored.parameter.module)
        if name not in found:
            raise CheckpointError(f"{type(mapping).__name__} gives {sorted(found)}, not {name}")
        return found[name]

    def _of_experts(self, name: str, producers: list[StoredParameter]) -> Tensor:
        """Put every expert into its place in a tensor of all experts (E, ...)."""
        result = torch.empty(0)
        for stored in producers:
            value = self._read(stored)
            if not result.numel():
                result = value.new_empty(self._wanted[name].shape)
            expert, places = self._part.table.expert_places(stored.parameter, name)
            result[expert][places] = value
        return result
