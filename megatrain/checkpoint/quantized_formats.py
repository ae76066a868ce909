"""How published checkpoints store quantised tensors, and their values again, in float32.

A format knows which tensors belong together, the shape of the plain one, and how to read a part of
it: only the rows and columns that are asked for are read and dequantised.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
Spans = tuple[tuple[int, int], ...]
"""First and last + 1 of each dimension."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_VALUES = (*FP4, *(-x for x in FP4))
"""What the four bits of an MXFP4 value mean (OCP Microscaling Formats 1.0, E2M1)."""


class Format(Protocol):
    """One way to store a quantised tensor."""

    def owner(self, name: str, names: Shapes) -> str | None:
        """Return the plain name of the quantised tensor that a stored one belongs to, or None."""
        ...

    def shape(
        self, name: str, shapes: Shapes, source: SafetensorsFolder | None = None
    ) -> tuple[int, ...]:
        """Return the plain shape of a quantised tensor, from stored shapes.

        Where those do not suffice, by what `source` holds.
        """
        ...

    def read(self, source: SafetensorsFolder, name: str, spans: Spans) -> Tensor:
        """Return a part of the plain tensor in float32."""
        ...


@dataclass(frozen=True, slots=True)
class ScaledBlocks:
    """FP8 with a factor for each block, the last block cut: `x` and `x_scale_inv` (DeepSeek-V3), or
    `x_scale` (compressed-tensors' strategy "block")."""

    block: tuple[int, int] = (128, 128)
    suffix: str = "_scale_inv"

    def owner(self, name: str, names: Shapes) -> str | None:
        """Return the weight's name for weight and factors."""
        plain = name.removesuffix(self.suffix)
        return plain if f"{plain}{self.suffix}" in names else None

    def shape(
        self, name: str, shapes: Shapes, source: SafetensorsFolder | None = None
    ) -> tuple[int, ...]:
        """Return the weight's own shape."""
        found, factors = shapes[name], shapes[f"{name}{self.suffix}"]
        wanted = tuple(math.ceil(n / b) for n, b in zip(found[-2:], self.block, strict=True))
        if factors[-2:] != wanted or found[:-2] != factors[:-2]:
            raise CheckpointError(
                f"{name} of shape {found} in blocks of {self.block} has factors {wanted}, "
                f"not {factors}",
                hint="the size of blocks in config.json does not fit the file",
            )
        return found

    def read(self, source: SafetensorsFolder, name: str, spans: Spans) -> Tensor:
        """Return values times their block's factor."""
        value = _part(source, name, spans)
        blocks = [
            (a // b, math.ceil(z / b)) for (a, z), b in zip(spans[-2:], self.block, strict=True)
        ]
        factors = _part(source, f"{name}{self.suffix}", (*spans[:-2], *blocks))
        for dim, ((start, stop), size) in enumerate(zip(spans[-2:], self.block, strict=True), -2):
            index = torch.arange(start, stop) // size - start // size
            factors = factors.index_select(dim, index)
        return value.float() * factors.float()


@dataclass(frozen=True, slots=True)
class MicroscaledFp4:
    """MXFP4 of gpt-oss: `x_blocks` (E, R, G, 16) holds two values a byte, `x_scales` (E, R, G)
    exponents.  The plain tensor is (E, 32 * G, R), as Transformers has it."""

    def owner(self, name: str, names: Shapes) -> str | None:
        """Return the name without `_blocks` or `_scales`."""
        plain = name.removesuffix("_blocks").removesuffix("_scales")
        return plain if f"{plain}_blocks" in names and f"{plain}_scales" in names else None

    def shape(
        self, name: str, shapes: Shapes, source: SafetensorsFolder | None = None
    ) -> tuple[int, ...]:
        """Return (E, 32 * G, R)."""
        experts, rows, groups, size = shapes[f"{name}_blocks"]
        return (experts, groups * size * 2, rows)

    def read(self, source: SafetensorsFolder, name: str, spans: Spans) -> Tensor:
        """Return values times two to the power of their group's exponent."""
        experts, columns, rows = spans
        groups = (columns[0] // 32, math.ceil(columns[1] / 32))
        blocks = source.slice(f"{name}_blocks")[slice(*experts), slice(*rows), slice(*groups)]
        exponents = source.slice(f"{name}_scales")[slice(*experts), slice(*rows), slice(*groups)]
        table = torch.tensor(FP4_VALUES)
        pairs = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1)
        value = torch.ldexp(pairs.flatten(-2), exponents.int()[..., None] - 127).flatten(-2)
        start = columns[0] - groups[0] * 32
        return value[..., start : start + columns[1] - columns[0]].transpose(1, 2).contiguous()


@dataclass(frozen=True, slots=True)
class PackedIntegers:
    """compressed-tensors "pack-quantized": integers of some bits in int32, a scale for each group.

    `x_packed` (R, C * bits / 32), `x_scale` (R, groups), perhaps `x_zero_point`, and `x_shape`.
    """

    bits: int
    group: int | None = None
    """Columns with one scale; None if that is a whole row, or not the same for all tensors."""

    def owner(self, name: str, names: Shapes) -> str | None:
        """Return the name without what the format adds."""
        for end in ("_packed", "_scale", "_shape", "_zero_point", "_g_idx"):
            plain = name.removesuffix(end)
            if plain != name and f"{plain}_packed" in names:
                return plain
        return None

    def shape(
        self, name: str, shapes: Shapes, source: SafetensorsFolder | None = None
    ) -> tuple[int, ...]:
        """Return (R, C): the last word of a row need not be full."""
        if f"{name}_g_idx" in shapes:
            raise CheckpointError(f"{name} is quantised in an order of its own (g_idx): not known")
        rows, packed = shapes[f"{name}_packed"]
        columns = packed * self.per_word
        if self.group is not None:
            columns = shapes[f"{name}_scale"][1] * self.group
        elif source is not None and f"{name}_shape" in source:
            columns = int(source[f"{name}_shape"][-1])
        if math.ceil(columns / self.per_word) != packed:
            raise CheckpointError(
                f"{name} of {columns} columns at {self.bits} bits has "
                f"{math.ceil(columns / self.per_word)} words a row, not {packed}",
                hint="group_size in config.json does not fit the file",
            )
        return (rows, columns)

    @property
    def per_word(self) -> int:
        """Values in one int32."""
        return 32 // self.bits

    def read(self, source: SafetensorsFolder, name: str, spans: Spans) -> Tensor:
        """Return (integer - zero point) times its group's scale."""
        rows, columns = spans
        shapes = {each: source.shape(each) for each in (f"{name}_packed", f"{name}_scale")}
        total = self.shape(name, shapes, source)[1]
        words = (columns[0] // self.per_word, math.ceil(columns[1] / self.per_word))
        integers = self._unpack(_part(source, f"{name}_packed", (rows, words)), 1)
        start = columns[0] - words[0] * self.per_word
        integers = integers[:, start : start + columns[1] - columns[0]].float()
        scale = source.slice(f"{name}_scale")[slice(*rows)].float()
        if f"{name}_zero_point" in source:
            zeros = self._unpack(source[f"{name}_zero_point"], 0)[slice(*rows)].float()
            integers -= _spread(zeros, columns, total)
        return integers * _spread(scale, columns, total)

    def _unpack(self, words: Tensor, dim: int) -> Tensor:
        """Return signed integers; the lowest bits of a word come first along `dim`."""
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        parts = [(words >> int(s)) & ((1 << self.bits) - 1) for s in shifts]
        return torch.stack(parts, dim + 1).flatten(dim, dim + 1) - (1 << (self.bits - 1))


@dataclass(frozen=True, slots=True)
class ScaledGroups:
    """compressed-tensors "int-quantized" and "float-quantized": `x` in one byte a value, `x_scale`
    for the tensor, for each row, or for each group of a row."""

    def owner(self, name: str, names: Shapes) -> str | None:
        """Return the weight's name for weight, scale and zero point."""
        plain = name.removesuffix("_scale").removesuffix("_zero_point")
        return plain if plain in names and f"{plain}_scale" in names else None

    def shape(
        self, name: str, shapes: Shapes, source: SafetensorsFolder | None = None
    ) -> tuple[int, ...]:
        """Return the weight's own shape."""
        return shapes[name]

    def read(self, source: SafetensorsFolder, name: str, spans: Spans) -> Tensor:
        """Return (value - zero point) times its scale."""
        rows, columns = spans
        value, total = _part(source, name, spans).float(), source.shape(name)[1]
        if f"{name}_zero_point" in source:
            value -= _of_entries(source[f"{name}_zero_point"], rows, columns, total)
        return value * _of_entries(source[f"{name}_scale"], rows, columns, total)


def _part(source: SafetensorsFolder, name: str, spans: Spans) -> Tensor:
    part: Tensor = source.slice(name)[tuple(slice(*span) for span in spans)]
    return part


def _of_entries(
    groups: Tensor, rows: tuple[int, int], columns: tuple[int, int], total: int
) -> Tensor:
    """Return what belongs to each entry, in float32: `groups` is one number, or (R, groups)."""
    if groups.numel() == 1:
        return groups.float().reshape(1, 1)
    part = groups[slice(*rows)].float()
    return _spread(part.reshape(part.shape[0], -1), columns, total)


def _spread(groups: Tensor, columns: tuple[int, int], total: int) -> Tensor:
    """Return each column's entry of (R, groups of the `total` columns)."""
    size = math.ceil(total / groups.shape[1])
    return groups.index_select(1, torch.arange(*columns) // size)
