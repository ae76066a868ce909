"""The base model's own parameters: to train all of them, and to write them back."""

from collections.abc import Iterator
from typing import Literal

import torch

from megatrain.checkpoint import quantized
from megatrain.checkpoint.names import LocalParameter, ParameterTable, parallel_kind
from megatrain.errors import ConfigError
from megatrain.model.fsdp import whole
from megatrain.model.tensor_slice import TensorPart, TensorSlice, TrainedParameter


def trained_parameters(table: ParameterTable, *, with_head: bool) -> list[TrainedParameter]:
    """Return every parameter of this rank; an output layer that is not tied only `with_head`.

    Raises ConfigError for a family whose parameters cannot be written back.
    """
    check_invertible(table)
    result = []
    for p in table.parameters:
        if not isinstance(p.parameter, torch.nn.Parameter):
            continue
        if not with_head and _is_own_head(p):
            continue
        kind = parallel_kind(p)
        split = kind == "column" or (kind == "row" and p.parameter.dim() == 2)
        tie = None
        if table.groups.mesh.pp > 1 and table.is_tied and p.global_name.startswith("embedding."):
            tie = int(p.local_name.startswith("output_layer."))
        parts = tuple(_parts(table, p))
        result.append(
            TrainedParameter(
                p.parameter, p.is_expert, not split, parts, tie=tie, place=_place(p.local_name)
            )
        )
    return result


def check_invertible(table: ParameterTable) -> None:
    """Raise ConfigError for a base that could be trained as a whole but not be saved.

    That is one whose checkpoint is quantised or has tensors beside the language model's, or a
    mapping of which is more than a split and a permutation of rows.
    """
    reason = _lost_beside_the_table(table)
    special = [p for p in table.parameters if parallel_kind(p) == "special"]
    if reason is None and special:
        mapping = special[0].mapping
        reason = f"{mapping.hf_param} ({type(mapping).__name__}) cannot be written back yet"
    if reason is not None:
        raise ConfigError(
            f"full-parameter training of this model is not supported, since {reason}",
            hint="train a LoRA adapter instead: add_adapter_to_model",
        )


def _lost_beside_the_table(table: ParameterTable) -> str | None:
    """Return why a checkpoint cannot be made of the parameters in the table, if so."""
    from megatrain_bridges.towers import TOWERS, tower_of  # noqa: PLC0415 - patched first

    architectures = set(table.hf_config.architectures or ())
    if towers := architectures & {tower_of(name) for name in TOWERS}:
        return f"{min(towers)} is a part of its checkpoint: the rest would not be saved"
    form = quantized.format_of(table.hf_config)
    if form is not None:
        return f"its checkpoint is quantised ({type(form).__name__}) and cannot be written as such"
    return None


def freeze_head(table: ParameterTable) -> None:
    """Ask for no gradient of an output layer that is not tied: scores do not use it."""
    for p in table.parameters:
        if _is_own_head(p):
            p.parameter.requires_grad_(False)


def _is_own_head(p: LocalParameter) -> bool:
    return p.global_name.startswith("output_layer.")


def base_slices(table: ParameterTable, *, with_head: bool = True) -> Iterator[TensorSlice]:
    """Yield the base's tensors by Hugging Face's names, as far as this rank holds them.

    The output layer only `with_head`.
    """
    for p in table.parameters:
        is_head = p.local_name.startswith("output_layer.")
        if is_head and (table.is_tied or not with_head):
            continue
        value = whole(p.parameter, table.groups)
        for part in _parts(table, p):
            yield part.of(value)


def _place(local_name: str) -> Literal["embedding", "head", "layer"]:
    if local_name.startswith("embedding."):
        return "embedding"
    return "head" if local_name.startswith("output_layer.") else "layer"


def _parts(table: ParameterTable, p: LocalParameter) -> Iterator[TensorPart]:
    kind = parallel_kind(p)
    if kind == "column":
        yield from _row_parts(table, p)
        return
    (name,) = table.hf_names(p)
    shape, (rank, size) = p.parameter.shape, table.tp_place(p)
    index = None
    if kind == "row" and len(shape) == 2:
        index = torch.arange(rank * shape[1], (rank + 1) * shape[1])
    full_shape = (shape[0], shape[1] * size) if index is not None else tuple(shape)
    yield TensorPart(name, full_shape, None if index is None else 1, index, p.is_expert)


def _row_parts(table: ParameterTable, p: LocalParameter) -> Iterator[TensorPart]:
    for part in table.parts(p):
        yield TensorPart(
            name=part.hf_name,
            full_shape=table.hf_shape(part.hf_name),
            dim=0,
            index=torch.from_numpy(part.rows),
            is_expert=p.is_expert,
            selection=(torch.from_numpy(part.places),),
        )
