"""One LoRA adapter on a model that is spread over ranks: made, initialised, walked over."""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatrain.config.lora import LoraSpec
from megatrain.model.lora_linear import LinearShape, LoraLinear
from megatrain.model.tensor_slice import TensorSlice, TrainedParameter


class Adapter:
    """The factors of one adapter on this rank, by Megatron linear."""

    def __init__(self, spec: LoraSpec, seed: int, linears: dict[str, LoraLinear]) -> None:
        self.spec, self.seed, self.linears = spec, seed, linears

    def trained_parameters(self) -> list[TrainedParameter]:
        """Return the parameters in a fixed order."""
        result = []
        for linear in self.linears.values():
            shape = linear.shape
            for letter, parameters in (("A", linear.lora_A), ("B", linear.lora_B)):
                replicated = not shape.is_split(letter)
                result += [TrainedParameter(p, shape.is_expert, replicated) for p in parameters]
        return result

    def slices(self) -> Iterator[TensorSlice]:
        """Yield every factor, one expert at a time: `<Hugging Face module>.lora_A` or `.lora_B`."""
        for linear in self.linears.values():
            yield from _slices(linear)

    @torch.no_grad()
    def reset(self) -> None:
        """Give every factor its initial value, which depends on (seed, name) alone."""
        for linear in self.linears.values():
            embedding = linear.shape.kind == "embedding"
            for factor in _slices(linear):
                whole = initial_value(factor, self.spec, self.seed, embedding=embedding)
                if factor.dim is not None and factor.index is not None:
                    whole = whole.index_select(factor.dim, factor.index)
                factor.value.copy_(whole)


def _slices(linear: LoraLinear) -> Iterator[TensorSlice]:
    shape = linear.shape
    columns = _columns(shape) if shape.is_split("A") else None
    for part, a, b in zip(linear.parts, linear.lora_A, linear.lora_B, strict=True):
        for expert, module in enumerate(part.hf_modules):
            a_value, b_value = a.detach(), b.detach()
            if shape.is_expert:
                a_value, b_value = a_value[expert], b_value[expert]
            yield TensorSlice(
                name=f"{module}.lora_A",
                value=a_value if columns is None else a_value[:, : len(columns)],
                full_shape=(part.rank, shape.total_in_features),
                dim=None if columns is None else 1,
                index=columns,
                is_expert=shape.is_expert,
            )
            split = shape.is_split("B")
            yield TensorSlice(
                name=f"{module}.lora_B",
                value=b_value,
                full_shape=(part.out_features, part.rank),
                dim=0 if split else None,
                index=part.rows if split else None,
                is_expert=shape.is_expert,
            )


def _columns(shape: LinearShape) -> Tensor:
    """Return which in-features are on this rank, without padding."""
    first = shape.tp_group.rank() * shape.in_features
    last = min(first + shape.in_features, shape.total_in_features)
    return torch.arange(first, max(first, last))


def initial_value(
    factor: TensorSlice, spec: LoraSpec, seed: int, *, embedding: bool = False
) -> Tensor:
    """Return a whole factor in float32 as PEFT would draw it, from (seed, name) alone.

    A: Kaiming uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)), or a normal with
    standard deviation 1/r for 'gaussian'.  B: zeros; with init_lora_weights=False drawn like A.
    An embedding's A is zero and its B normal, as in PEFT.
    """
    is_a, shape = factor.name.endswith("lora_A"), factor.full_shape
    digest = hashlib.blake2b(f"{seed}:{factor.name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    value = torch.empty(shape)
    if embedding:
        return value.zero_() if is_a else value.normal_(generator=generator)
    if not is_a and spec.init_lora_weights is not False:
        return value.zero_()
    if spec.init_lora_weights == "gaussian":
        return value.normal_(std=1 / shape[0], generator=generator)
    bound = 1 / math.sqrt(shape[1])
    return value.uniform_(-bound, bound, generator=generator)
