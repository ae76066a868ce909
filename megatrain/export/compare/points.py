"""Where a Megatron model is looked at, by the names of the Hugging Face modules that it stands for.

Which feature of a fused or split linear is which row of a Hugging Face linear comes from the one
table of names.  Routed experts see chosen tokens in an order of their own: their layer is a point,
they are none.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.checkpoint.names import LocalParameter, ParameterTable, parallel_kind
from megatrain.export.compare.trace import input_of

_LAYER = re.compile(r"decoder\.layers\.\d+\.")
_RENAMED = {"block_sparse_moe": "mlp"}
"""Modules that Transformers calls otherwise than the checkpoints' tensors in them."""
_Own = dict[str, LocalParameter]
"""Parameters of one module, by their last name."""


@dataclass(frozen=True, slots=True)
class Point:
    """A module's output, or what enters it, and which features of the whole these are."""

    name: str
    module: nn.Module
    is_input: bool = False
    features: Tensor | None = None
    """Of the Hugging Face module's output (or input)."""
    columns: Tensor | None = None
    """Of this rank's."""


def points_of(table: ParameterTable, chunk: Any) -> Iterator[Point]:
    """Yield the points of one model chunk."""
    owned: defaultdict[nn.Module, _Own] = defaultdict(dict)
    for parameter in table.parameters:
        owned[parameter.module][parameter.local_name.rpartition(".")[2]] = parameter
    if getattr(chunk, "pre_process", False):
        word = owned[chunk.embedding.word_embeddings]["weight"]
        yield Point(_hf_module(table, word), chunk.decoder.layers[0], is_input=True)
    for module, own in owned.items():
        weight = own.get("weight")
        if weight is not None and _LAYER.match(weight.local_name) and not weight.is_expert:
            yield from _points_of_module(table, module, weight)
    for layer in chunk.decoder.layers:
        yield from _points_of_layer(table, layer, owned)
    norm = getattr(chunk.decoder, "final_layernorm", None)
    if norm is not None and norm in owned:
        yield Point(_hf_module(table, owned[norm]["weight"]), norm)


def split_output(output: Any) -> tuple[Tensor, Tensor | None]:
    """Return a Megatron module's output, and a bias of its that is added later."""
    if not isinstance(output, tuple):
        return output, None
    value, more = output[0], output[1] if len(output) > 1 else None
    if isinstance(value, tuple):  # a linear's output with the normed input
        value = value[0]
    is_bias = isinstance(more, Tensor) and more.shape == value.shape[-1:]
    return value, more if is_bias else None


def _points_of_module(
    table: ParameterTable, module: nn.Module, weight: LocalParameter
) -> Iterator[Point]:
    """Yield the points of a linear, or of a norm of whole hidden states."""
    kind, is_matrix = parallel_kind(weight), weight.parameter.dim() == 2
    is_linear = is_matrix and "Linear" in type(module).__name__
    if is_linear and kind == "column":
        for part in table.parts(weight):
            features, columns = torch.as_tensor(part.rows), torch.as_tensor(part.places)
            name = part.hf_name.removesuffix(".weight")
            yield Point(name, module, features=features, columns=columns)
        return
    if is_linear and kind == "row":
        rank, _ = table.tp_place(weight)
        width = weight.parameter.shape[1]
        inside = torch.arange(rank * width, (rank + 1) * width)
        yield Point(input_of(_hf_module(table, weight)), module, is_input=True, features=inside)
    # Norms of single heads have other shapes; the one behind attention is one of hidden states.
    is_inside = ".self_attention." in weight.local_name
    is_inside &= not weight.local_name.endswith(".post_layernorm.weight")
    is_norm = "Norm" in type(module).__name__ and not is_inside
    if (is_linear or is_norm) and kind != "special" and not _norms_its_output(module):
        yield Point(_hf_module(table, weight), module)


def _points_of_layer(
    table: ParameterTable, layer: Any, owned: dict[nn.Module, _Own]
) -> Iterator[Point]:
    """Yield a layer, its attention and its MLP, under the names that their linears lie in."""
    path = ""
    for owner in (layer.self_attention, layer.mlp):
        inside = [module for module in owner.modules() if module in owned]
        ends = [module for module in inside if _ends(module, owned[module])]
        if not ends:
            continue
        names = [_hf_module(table, owned[module]["weight"]) for module in ends]
        own = min(names, key=lambda name: name.count(".")).rpartition(".")[0]
        path, _, last = own.rpartition(".")
        if not any(_norms_its_output(module) for module in ends):
            yield Point(f"{path}.{_RENAMED.get(last, last)}", owner)
    if path:
        yield Point(path, layer)


def _ends(module: nn.Module, own: _Own) -> bool:
    """Tell whether a module lies directly in attention or MLP: a last linear, or a router."""
    weight = own.get("weight")
    if weight is None or weight.is_expert:
        return False
    return parallel_kind(weight) == "row" or "Router" in type(module).__name__


def _norms_its_output(module: nn.Module) -> bool:
    """Tell whether Megatron's linear holds a norm that Transformers calls after the module."""
    return hasattr(module, "post_layernorm")


def _hf_module(table: ParameterTable, weight: LocalParameter) -> str:
    return table.hf_names(weight)[0].removesuffix(".weight")
