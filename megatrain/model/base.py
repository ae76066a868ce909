"""The base model's own parameters: to train all of them, and to write them back."""

from collections.abc import Iterator

import torch

from megatrain.checkpoint.names import LocalParameter, ParameterTable, parallel_kind
from megatrain.errors import ConfigError
from megatrain.model.tensor_slice import TensorSlice, TrainedParameter


def trained_parameters(table: ParameterTable) -> list[TrainedParameter]:
    """Return every parameter of this rank.

    Raises ConfigError for a family whose parameters cannot be written back.
    """
    check_invertible(table)
    result = []
    for p in table.parameters:
        if not isinstance(p.parameter, torch.nn.Parameter):
            continue
        kind = parallel_kind(p)
        split = kind == "column" or (kind == "row" and p.parameter.dim() == 2)
        tie = None
        if table.groups.mesh.pp > 1 and table.is_tied and p.global_name.startswith("embedding."):
            tie = int(p.local_name.startswith("output_layer."))
        result.append(TrainedParameter(p.parameter, p.is_expert, not split, tie))
    return result


def check_invertible(table: ParameterTable) -> None:
    """Raise ConfigError if a mapping is more than a split and a permutation of rows."""
    special = [p for p in table.parameters if parallel_kind(p) == "special"]
    if special:
        raise ConfigError(
            "full-parameter training of this family is not supported, since "
            f"{special[0].mapping.hf_param} ({type(special[0].mapping).__name__}) cannot be "
            "written back yet",
            hint="train a LoRA adapter instead: add_adapter_to_model",
        )


def base_slices(table: ParameterTable) -> Iterator[TensorSlice]:
    """Yield the base's tensors by Hugging Face's names, as far as this rank holds them."""
    for p in table.parameters:
        if table.is_tied and p.local_name.startswith("output_layer."):
            continue
        kind = parallel_kind(p)
        if kind == "column":
            yield from _row_slices(table, p)
            continue
        (name,) = table.hf_names(p)
        value, rank, size = p.parameter.detach(), *table.tp_place(p)
        index = None
        if kind == "row" and value.dim() == 2:
            index = torch.arange(rank * value.shape[1], (rank + 1) * value.shape[1])
        shape = (value.shape[0], value.shape[1] * size) if index is not None else value.shape
        dim = None if index is None else 1
        yield TensorSlice(name, value, tuple(shape), dim, index, p.is_expert)


def _row_slices(table: ParameterTable, p: LocalParameter) -> Iterator[TensorSlice]:
    value = p.parameter.detach()
    for part in table.parts(p):
        yield TensorSlice(
            name=part.hf_name,
            value=value[torch.from_numpy(part.places).to(value.device)],
            full_shape=table.hf_shape(part.hf_name),
            dim=0,
            index=torch.from_numpy(part.rows),
            is_expert=p.is_expert,
        )
