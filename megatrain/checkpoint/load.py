"""Fill a model that is spread over ranks from safetensors: each rank reads its own slices.

Memory beyond the parameters: one part of one fused parameter at a time.  A mapping that is more
than a split and a permutation of rows (dequantisation, expert tensors of three dimensions) is run
whole, without communication, one parameter at a time.
"""

import itertools
import logging
import re
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatrain.checkpoint.names import LocalParameter, ParameterTable, Part, Rows, parallel_kind
from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.errors import CheckpointError

logger = logging.getLogger(__name__)


@torch.no_grad()
def load_parameters(table: ParameterTable, source: SafetensorsFolder) -> None:
    """Read every parameter of this rank.  No communication.

    Raises CheckpointError for a missing tensor, a wrong shape, or a shard that cannot be read.
    """
    source = table.plain(source)
    show = table.groups.rank == 0 and len(source) > 1000
    for parameter in tqdm(table.parameters, desc="loading", disable=not show):
        load_parameter(table, parameter, source)
    check_claimed(table, source)


ROWS = 8192
"""Of a head and an embedding, compared at a time."""


def check_claimed(table: ParameterTable, source: SafetensorsFolder) -> None:
    """Raise CheckpointError for a kind of tensor that no mapping reads: a bias, say."""
    kinds = {re.sub(r"\d+", "*", name): name for name in source}
    unclaimed = [
        name
        for name in kinds.values()
        if not name.endswith(".rotary_emb.inv_freq") and not table.claims(name)
    ]
    if unclaimed:
        raise CheckpointError(
            f"the family's bridge reads no tensor like {', '.join(sorted(unclaimed)[:5])}",
            hint="the model would compute something else without it; see bridges/README.md",
        )
    _check_layers(table, source)
    _check_tied(table, source)


def _check_layers(table: ParameterTable, source: SafetensorsFolder) -> None:
    """Raise CheckpointError if the file has layers that the configuration does not count."""
    config = getattr(table.hf_config, "text_config", None) or table.hf_config
    more = getattr(config, "num_nextn_predict_layers", None) or 0
    count = int(config.num_hidden_layers) + int(more)
    found = {
        int(layer[1])
        for name in source
        if (layer := re.match(r"(?:\w+\.){0,2}layers\.(\d+)\.", name))
    }
    if beyond := sorted(layer for layer in found if layer >= count):
        raise CheckpointError(
            f"the checkpoint has layers {beyond[:5]}, but config.json counts {count}",
            hint="the checkpoint does not fit its config.json",
        )


def _check_tied(table: ParameterTable, source: SafetensorsFolder) -> None:
    """Raise CheckpointError if the file has a head of its own though the two are to be one."""
    head = "lm_head.weight"
    embedding = next((name for name in source if name.endswith("embed_tokens.weight")), None)
    if not table.is_tied or head not in source or embedding is None:
        return
    one, other = source.slice(head), source.slice(embedding)
    rows = source.shape(head)[0]
    same = source.shape(head) == source.shape(embedding) and all(
        torch.equal(one[first : first + ROWS], other[first : first + ROWS])
        for first in range(0, rows, ROWS)
    )
    if not same:
        raise CheckpointError(
            f"config.json says that head and embedding are one, but {head} is not {embedding}",
            hint="Transformers takes the two apart then; set tie_word_embeddings to false",
        )


def load_parameter(
    table: ParameterTable, parameter: LocalParameter, source: SafetensorsFolder
) -> None:
    """Read one parameter of this rank.  No communication.

    Raises CheckpointError as load_parameters does.
    """
    source = table.plain(source)
    kind = parallel_kind(parameter)
    if kind == "special" or _rewrites_weights(table):
        value = _convert(table, parameter, source)
        _check_shape(parameter, tuple(value.shape), tuple(parameter.parameter.shape))
        parameter.parameter.copy_(value)
    elif kind == "column":
        _read_rows(table, parameter, source)
    else:
        _read_whole_or_columns(table, parameter, source, kind)


def _convert(
    table: ParameterTable, parameter: LocalParameter, source: SafetensorsFolder
) -> torch.Tensor:
    try:
        return table.convert(parameter, source)
    except (KeyError, ValueError, AssertionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"cannot convert {table.hf_names(parameter)} to {parameter.global_name}: {error}"
        ) from error


ONLY_DEQUANTIZE = ("DeepSeekV3Bridge", "MiniMaxM2Bridge")
"""Bridges that change loaded weights to dequantise them and for no other reason."""


def _rewrites_weights(table: ParameterTable) -> bool:
    from megatron.bridge.models.conversion.model_bridge import (  # noqa: PLC0415 - patched first
        MegatronModelBridge,
    )

    bridge = type(table._bridge)
    rewrites = (
        bridge.maybe_modify_loaded_hf_weight
        is not MegatronModelBridge.maybe_modify_loaded_hf_weight
    )
    return rewrites and bridge.__name__ not in ONLY_DEQUANTIZE


def _read_rows(table: ParameterTable, parameter: LocalParameter, source: SafetensorsFolder) -> None:
    """Fill a column-parallel parameter from row ranges of its parts."""
    names = table.hf_names(parameter)
    shapes = [source.shape(name) for name in names]
    target = parameter.parameter
    for name, shape in zip(names, shapes, strict=True):
        _check_shape(parameter, shape[1:], tuple(target.shape[1:]), name)
    _, size = table.tp_place(parameter)
    total, padding = sum(shape[0] for shape in shapes), target.shape[0] * size
    padded = "word_embeddings" in parameter.global_name or "output_layer" in parameter.global_name
    if total != (table.vocab_size if padded else padding):
        raise CheckpointError(
            f"{', '.join(names)}: {total} rows, but {parameter.global_name} has {padding}",
            hint="the checkpoint does not fit its config.json",
        )
    if total < padding:
        target.zero_()
    for part in table.parts(parameter):
        _copy_runs(target, part, source)


def _copy_runs(target: torch.Tensor, part: Part, source: SafetensorsFolder) -> None:
    view: Any = source.slice(part.hf_name)
    for start, stop in runs(part.rows, part.places):
        rows = slice(int(part.rows[start]), int(part.rows[stop - 1]) + 1)
        place = int(part.places[start])
        target[place : place + stop - start].copy_(view[rows])


def runs(rows: Rows, places: Rows) -> list[tuple[int, int]]:
    """Return ranges [start, stop) over which two indices are consecutive, both of them."""
    if not len(rows):
        return []
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(places) != 1)) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return list(itertools.pairwise(edges))


def _read_whole_or_columns(
    table: ParameterTable, parameter: LocalParameter, source: SafetensorsFolder, kind: str
) -> None:
    (name,) = table.hf_names(parameter)
    target, shape = parameter.parameter, source.shape(name)
    if kind == "row" and target.dim() == 2:
        rank, size = table.tp_place(parameter)
        width = target.shape[1]
        _check_shape(parameter, shape, (target.shape[0], width * size), name)
        target.copy_(source.slice(name)[:, rank * width : (rank + 1) * width])
        return
    _check_shape(parameter, shape, tuple(target.shape), name)
    target.copy_(source[name])


def _check_shape(
    parameter: LocalParameter,
    found: tuple[int, ...],
    expected: tuple[int, ...],
    name: str | None = None,
) -> None:
    if found != expected:
        raise CheckpointError(
            f"{name or parameter.mapping.hf_param} has shape {found}, but {parameter.global_name} "
            f"needs {expected}",
            hint="the checkpoint does not fit its config.json",
        )
