"""A quantised checkpoint as one of plain tensors under plain names, dequantised while it is read.

What is kept: nothing but the tensor of experts that was asked for last, since each expert asks for
all of it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.quantized_formats import (
    Format,
    MicroscaledFp4,
    PackedIntegers,
    ScaledBlocks,
    ScaledGroups,
    Shapes,
)
from megatrain.checkpoint.safetensors_folder import MissingTensorError, SafetensorsFolder
from megatrain.errors import CheckpointError

METHODS = ("fp8", "mxfp4", "compressed-tensors")
COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized")


def format_of(config: Any) -> Format | None:
    """Return how a model's tensors are quantised, by its configuration; None if they are not.

    Raises CheckpointError for a method that is not known.
    """
    found = getattr(config, "quantization_config", None)
    if found is None and hasattr(config, "get_text_config"):
        found = getattr(config.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    settings: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    match settings.get("quant_method"):
        case "fp8":
            return ScaledBlocks(tuple(settings.get("weight_block_size") or (128, 128)))
        case "mxfp4":
            return MicroscaledFp4()
        case "compressed-tensors":
            return _compressed(settings)
        case method:
            raise CheckpointError(
                f"unknown quant_method {method!r} in config.json; known: {', '.join(METHODS)}",
                hint="use the checkpoint that is not quantised, or dequantise it first",
            )


def _compressed(settings: dict[str, Any]) -> Format:
    groups = settings.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values()]
    kind = settings.get("format")
    bits = {int(each.get("num_bits", 0)) for each in weights}
    strategies = {_strategy(each) for each in weights}
    if kind == "pack-quantized" and bits in ({4}, {8}) and strategies <= {"group", "channel"}:
        sizes = {each.get("group_size") if _strategy(each) == "group" else None for each in weights}
        return PackedIntegers(bits.pop(), sizes.pop() if len(sizes) == 1 else None)
    if kind in COMPRESSED[1:] and bits == {8}:
        if strategies <= {"tensor", "channel", "group"}:
            return ScaledGroups()
        blocks = {tuple(each.get("block_structure") or ()) for each in weights}
        is_symmetric = all(each.get("symmetric", True) for each in weights)
        if strategies == {"block"} and len(blocks) == 1 and all(blocks) and is_symmetric:
            rows, columns = blocks.pop()
            return ScaledBlocks((rows, columns), "_scale")
    raise CheckpointError(
        f"compressed-tensors of format {kind!r} with {sorted(bits)} bits and strategy "
        f"{' and '.join(sorted(strategies))} is not known; known: pack-quantized with 4 or 8 bits "
        "by group or channel, int-quantized and float-quantized with 8 bits by tensor, channel or "
        "group, or all by symmetric blocks of one size",
        hint="use the checkpoint that is not quantised, or dequantise it first",
    )


def _strategy(weights: dict[str, Any]) -> str:
    """Return what one scale is for; compressed-tensors tells it by the group's size if need be."""
    size = weights.get("group_size")
    implied = "tensor" if size is None else "group" if size > 0 else "channel"
    return str(weights.get("strategy") or implied)


def plain_shapes(
    config: Any, shapes: Shapes, source: SafetensorsFolder | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of plain tensors by plain names; what is plain already stays.

    Without the checkpoint itself, rows of packed integers that have one scale each may seem longer
    than they are, by less than a word.
    """
    form = format_of(config)
    if form is None:
        return dict(shapes)
    result = {}
    for name, shape in shapes.items():
        owner = form.owner(name, shapes)
        if owner is None:
            result[name] = shape
        elif owner not in result:
            result[owner] = form.shape(owner, shapes, source)
    return result


def plain_tensors(config: Any, source: SafetensorsFolder) -> SafetensorsFolder:
    """Return the same checkpoint with plain tensors; itself if it is not quantised."""
    form = format_of(config)
    if form is None or isinstance(source, QuantizedFolder):
        return source
    return QuantizedFolder(config, form, source)


class QuantizedFolder(SafetensorsFolder):
    """A view of a folder with quantised tensors."""

    def __init__(self, config: Any, form: Format, source: SafetensorsFolder) -> None:
        self.folder = source.folder
        self._form, self._source = form, source
        self._stored = stored = source.shapes()
        self._shapes = plain_shapes(config, stored, source)
        self._quantized = {n for n in self._shapes if form.owner(n, stored) or n not in stored}
        self._last: tuple[str, Tensor] | None = None

    def owner(self, stored: str) -> str:
        """Return the plain name of what a stored tensor is, or is a part of."""
        return self._form.owner(stored, self._stored) or stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, key: object) -> bool:
        return key in self._shapes

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a plain tensor's shape without reading it."""
        if key not in self._shapes:
            raise MissingTensorError(
                f"no tensor {key!r} in {self.folder}",
                hint="the checkpoint does not fit its config.json",
            )
        return self._shapes[key]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every plain tensor."""
        return dict(self._shapes)

    def dtype(self, key: str) -> torch.dtype:
        """Return float32 for a tensor that is dequantised, else what the file has."""
        return torch.float32 if key in self._quantized else self._source.dtype(key)

    def slice(self, key: str) -> Any:
        """Return a lazy view: `.get_shape()`, and indexing dequantises just that part."""
        shape = self.shape(key)
        if key not in self._quantized:
            return self._source.slice(key)
        return QuantizedSlice(self._form, self._source, key, shape)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._quantized:
            self.shape(key)
            return self._source[key]
        if self._last is None or self._last[0] != key:
            value = self.slice(key)[...]
            if value.dim() < 3:
                result: Tensor = value
                return result
            self._last = (key, value)
        return self._last[1]


class QuantizedSlice:
    """What safetensors' own lazy slice offers, for a tensor that is dequantised when indexed."""

    def __init__(
        self, form: Format, source: SafetensorsFolder, name: str, shape: tuple[int, ...]
    ) -> None:
        self._form, self._source, self._name, self._shape = form, source, name, shape

    def get_shape(self) -> list[int]:
        """Return the plain shape."""
        return list(self._shape)

    def __getitem__(self, index: Any) -> Tensor:
        given = index if isinstance(index, tuple) else (index,)
        given = tuple(slice(None) if each is Ellipsis else each for each in given)
        missing = len(self._shape) - len(given)
        whole = (*given, *(slice(None) for _ in range(missing)))
        spans = tuple(each.indices(n)[:2] for each, n in zip(whole, self._shape, strict=True))
        return self._form.read(self._source, self._name, spans)
