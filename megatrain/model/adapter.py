"""One LoRA adapter on a model that is spread over ranks: made, initialised, walked over."""

import hashlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from megatrain.config.lora import LoraSpec
from megatrain.model.lora_linear import LinearShape, LoraLinear, LoraPart
from megatrain.model.tensor_slice import TensorPart, TensorSlice, TrainedParameter


class Adapter:
    """The factors of one adapter on this rank, by Megatron linear."""

    def __init__(self, spec: LoraSpec, seed: int, linears: dict[str, LoraLinear]) -> None:
        self.spec, self.seed, self.linears = spec, seed, linears
        self.score: TrainedParameter | None = None
        """The score head that is trained with it, on the last stage of a reward model."""

    @property
    def head(self) -> LoraLinear | None:
        """Its factors on the output layer, if there are any on this rank."""
        found = (each for name, each in self.linears.items() if name.endswith(".output_layer"))
        return next(found, None)

    def trained_parameters(self) -> list[TrainedParameter]:
        """Return the parameters in a fixed order."""
        result = [each for name, linear in self.linears.items() for each in _trained(name, linear)]
        return result if self.score is None else [*result, self.score]

    def slices(self) -> Iterator[TensorSlice]:
        """Yield every factor, one expert at a time: `<Hugging Face module>.lora_A` or `.lora_B`.

        A score head comes last, as `score.weight`.
        """
        for linear in self.linears.values():
            yield from _slices(linear)
        if self.score is not None:
            yield self.score.parts[0].of(self.score.parameter)

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


def _trained(name: str, linear: LoraLinear) -> Iterator[TrainedParameter]:
    shape = linear.shape
    place: Literal["embedding", "head", "layer"] = "layer"
    if shape.kind == "embedding":
        place = "embedding"
    elif name.endswith(".output_layer"):
        place = "head"
    for letter, parameters, parts_of in (
        ("A", linear.lora_A, _parts_of_a),
        ("B", linear.lora_B, _parts_of_b),
    ):
        for parameter, part in zip(parameters, linear.parts, strict=True):
            yield TrainedParameter(
                parameter,
                shape.is_expert,
                is_replicated=not shape.is_split(letter),
                parts=tuple(parts_of(shape, part)),
                factor="A" if letter == "A" else "B",
                place=place,
            )


def _slices(linear: LoraLinear) -> Iterator[TensorSlice]:
    for part, a, b in zip(linear.parts, linear.lora_A, linear.lora_B, strict=True):
        both = zip(_parts_of_a(linear.shape, part), _parts_of_b(linear.shape, part), strict=True)
        for part_of_a, part_of_b in both:
            yield part_of_a.of(a)
            yield part_of_b.of(b)


def _parts_of_a(shape: LinearShape, part: LoraPart) -> Iterator[TensorPart]:
    columns = _columns(shape) if shape.is_split("A") else None
    kept = () if columns is None else (slice(None), slice(len(columns)))
    for expert, module in enumerate(part.hf_modules):
        yield TensorPart(
            name=f"{module}.lora_A",
            full_shape=(part.rank, shape.total_in_features),
            dim=None if columns is None else 1,
            index=columns,
            is_expert=shape.is_expert,
            selection=(expert, *kept) if shape.is_expert else kept,
        )


def _parts_of_b(shape: LinearShape, part: LoraPart) -> Iterator[TensorPart]:
    split = shape.is_split("B")
    for expert, module in enumerate(part.hf_modules):
        yield TensorPart(
            name=f"{module}.lora_B",
            full_shape=(part.out_features, part.rank),
            dim=0 if split else None,
            index=part.rows if split else None,
            is_expert=shape.is_expert,
            selection=(expert,) if shape.is_expert else (),
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
