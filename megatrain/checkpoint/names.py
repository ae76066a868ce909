"""The one table of names: which Megatron parameter is which Hugging Face parameter, and which rows.

AutoBridge's mapping registry is the source.  Loading, LoRA targets and PEFT names derive from it.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    ColumnParallelMapping,
    ConcatenatedQKVMapping,
    GatedMLPMapping,
    GDNLinearMapping,
    GDNLinearMappingSeparate,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
    merge_qkv_biases,
)
from megatron.bridge.models.ernie.ernie_45_bridge import (
    _PPSafeAutoMapping,
    _PPSafeGatedMLPMapping,
    _PPSafeReplicatedMapping,
)
from megatron.bridge.models.minimax_m2.minimax_m2_bridge import _FullDimQKNormMapping

from megatrain.checkpoint.alone import Alone, every_rank_is_the_first
from megatrain.checkpoint.delta_net_rows import delta_net_rows
from megatrain.checkpoint.quantized import plain_shapes, plain_tensors
from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.errors import CheckpointError
from megatrain.parallel.groups import Groups
from megatrain_bridges.concatenated import ConcatenatedGatedMLPMapping

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """A parameter of this rank, its name in the whole model, and its mapping."""

    chunk: int
    """Index of the model chunk (virtual pipeline stage) that holds it."""
    local_name: str
    global_name: str
    """With layers and experts numbered over all ranks."""
    module: torch.nn.Module
    parameter: torch.Tensor
    """A parameter, or a buffer that is saved with the model."""
    mapping: Any
    """A resolved mapping of megatron-bridge."""

    @property
    def is_expert(self) -> bool:
        """Tell whether it belongs to one routed expert."""
        return bool(self.mapping.is_expert)


@dataclass(frozen=True, slots=True)
class Part:
    """One Hugging Face parameter inside a (possibly fused) Megatron parameter."""

    hf_name: str
    rows: Rows
    """For each local row that belongs to this part, in order: its row in the Hugging Face
    parameter."""
    places: Rows
    """Where those rows are in the local Megatron parameter."""
    out_features: int
    """Rows of the whole Hugging Face parameter (for a tensor of experts: of one expert)."""


def parallel_kind(parameter: LocalParameter) -> str:
    """Return column, row or replicated as AutoMapping sees the module, or `special`."""
    mapping = parameter.mapping
    exact = {
        ColumnParallelMapping: "column",
        QKVMapping: "column",
        GatedMLPMapping: "column",
        ConcatenatedQKVMapping: "column",
        ConcatenatedGatedMLPMapping: "column",
        GDNLinearMapping: "column",
        GDNLinearMappingSeparate: "column",
        _FullDimQKNormMapping: "column",
        _PPSafeGatedMLPMapping: "column",
        _PPSafeReplicatedMapping: "replicated",
        RowParallelMapping: "row",
        ReplicatedMapping: "replicated",
    }
    if type(mapping) in exact:
        return exact[type(mapping)]
    if type(mapping) in (AutoMapping, _PPSafeAutoMapping) and mapping.permute_dims is None:
        return str(mapping._detect_parallelism_type(parameter.module))
    return "special"


class ParameterTable:
    """Every parameter of this rank's model chunks with its mapping.  No communication."""

    def __init__(
        self,
        auto_bridge: Any,
        chunks: Sequence[torch.nn.Module],
        groups: Groups,
        hf_shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.groups = groups
        self._places: dict[Any, tuple[torch.Tensor, ...]] = {}
        hf_pretrained = auto_bridge.hf_pretrained
        self.hf_config: Any = getattr(hf_pretrained, "config", hf_pretrained)
        self.hf_shapes = plain_shapes(self.hf_config, hf_shapes)
        """Of every Hugging Face parameter of the whole model, dequantised where it is not."""
        config: Any = chunks[0].config
        self._config = config
        self._bridge = auto_bridge._model_bridge
        self._bridge.hf_pretrained = hf_pretrained
        self._bridge.hf_config = self.hf_config
        self._registry = self._bridge.mapping_registry()
        self._registry.set_process_groups_from_pg_collection(
            SimpleNamespace(
                tp=Alone(groups.mesh.tp),
                expt_tp=Alone(groups.mesh.etp),
                pp=Alone(1),
                ep=Alone(1),
            )
        )
        self._view: tuple[SafetensorsFolder, SafetensorsFolder] | None = None
        self.vocab_size = int(config.vocab_size)
        self.is_tied = bool(getattr(chunks[0], "share_embeddings_and_output_weights", False))
        self.parameters = [p for i, chunk in enumerate(chunks) for p in self._of_chunk(i, chunk)]

    def _of_chunk(self, index: int, chunk: torch.nn.Module) -> Iterator[LocalParameter]:
        modules: dict[str, Any] = dict(chunk.named_modules())
        for local_name, parameter in _tensors(chunk, modules):
            if self.is_tied and local_name == "output_layer.weight":
                local_name_in_table = "embedding.word_embeddings.weight"
            else:
                local_name_in_table = local_name
            module = modules[local_name.rpartition(".")[0]]
            if not hasattr(module, "config"):
                module.config = self._config
            global_name = self._global_name(local_name_in_table, modules)
            mapping = self._registry.megatron_to_hf_lookup(global_name)
            if mapping is None and not isinstance(parameter, torch.nn.Parameter):
                continue  # Megatron's own state
            if mapping is None:
                raise CheckpointError(
                    f"{type(self._bridge).__name__} maps no Hugging Face parameter to "
                    f"{global_name!r}",
                    hint="the family's bridge is incomplete; see bridges/README.md",
                )
            yield LocalParameter(index, local_name, global_name, module, parameter, mapping)

    def _global_name(self, name: str, modules: dict[str, Any]) -> str:
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if layer:
            number = modules[layer.group(0)[:-1]].layer_number - 1
            name = f"decoder.layers.{number}.{name[layer.end() :]}"
        expert = re.search(r"\.experts\.linear_fc[12]\.(weight|bias)(\d+)$", name)
        if expert:
            mesh, collection = self.groups.mesh, self.groups.collection
            first = collection.ep.rank() * (self._config.num_moe_experts // mesh.ep)
            name = f"{name[: expert.start(2)]}{first + int(expert.group(2))}"
        return name

    def plain(self, source: SafetensorsFolder) -> SafetensorsFolder:
        """Return a checkpoint's plain tensors: itself, or a view that dequantises."""
        if self._view is None or self._view[0] is not source:
            self._view = (source, plain_tensors(self.hf_config, source))
        return self._view[1]

    def tp_place(self, parameter: LocalParameter) -> tuple[int, int]:
        """Return (rank, size) of the tensor parallel group that splits this parameter."""
        group = self.groups.expert_tp if parameter.is_expert else self.groups.tp
        return group.rank(), group.size()

    def hf_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a Hugging Face parameter.  Raises CheckpointError if unknown."""
        if name not in self.hf_shapes:
            raise CheckpointError(
                f"the checkpoint has no tensor {name!r}",
                hint="it does not fit its config.json",
            )
        return self.hf_shapes[name]

    def claims(self, hf_name: str) -> bool:
        """Tell whether some Megatron parameter of this family is made of a Hugging Face tensor."""
        return self._registry.hf_to_megatron_lookup(hf_name) is not None

    def all_hf_modules(self) -> list[str]:
        """Return the module of every weight in the model: matrices, and tensors of experts.

        A tensor of experts is called by its first: `...experts.0.gate_up_proj`.
        """
        result = []
        for name, shape in self.hf_shapes.items():
            if len(shape) == 2 and name.endswith(".weight"):
                result.append(name.removesuffix(".weight"))
            elif len(shape) == 3:
                prefix, _, leaf = name.removesuffix(".weight").rpartition(".")
                result.append(f"{prefix}.0.{leaf}")
        return result

    def hf_names(self, parameter: LocalParameter) -> list[str]:
        """Return the Hugging Face parameters that are fused into this one, in mapping order."""
        names = parameter.mapping.hf_param
        return [names] if isinstance(names, str) else list(names.values())

    def parts(self, parameter: LocalParameter) -> list[Part]:
        """Tell where each row of a column-parallel parameter comes from.

        The mapping itself is run on row numbers, so what it does to a bias is the answer.
        """
        names = self.hf_names(parameter)
        sizes = [self.hf_shape(name)[0] for name in names]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        labels = [torch.arange(a, b) for a, b in itertools.pairwise(starts)]
        fused_rows = self._fuse(parameter, labels).numpy()
        result = []
        for name, first, size in zip(names, starts[:-1], sizes, strict=True):
            places = np.flatnonzero((fused_rows >= first) & (fused_rows < first + size))
            result.append(Part(name, fused_rows[places] - first, places, size))
        return result

    def expert_part(self, parameter: LocalParameter) -> Part | None:
        """Tell the same for one expert of a Hugging Face tensor that holds all experts (E, ., .).

        None if the mapping does more than choose an expert, transpose and permute rows.
        """
        (name,) = self.hf_names(parameter)
        shape = self.hf_shape(name)
        if not parameter.is_expert or len(shape) != 3 or self.groups.mesh.etp > 1:
            return None
        first = re.sub(r"\d+$", "0", parameter.global_name)
        mapping = self._registry.megatron_to_hf_lookup(first)
        both = []
        for dim in (1, 2):
            view = [1, 1, 1]
            view[dim] = -1
            labels = torch.arange(shape[dim]).view(view).expand(1, *shape[1:])
            given = self._bridge.maybe_modify_loaded_hf_weight(name, {name: labels})
            both.append(mapping.hf_to_megatron(given, parameter.module))
        rows, columns = both if int(both[0][0, 0] != both[0][-1, 0]) else both[::-1]
        if not torch.equal(columns[0], torch.arange(columns.shape[1])):
            return None
        rows = rows[:, 0].numpy()
        return Part(name, rows, np.arange(len(rows)), len(rows))

    def expert_places(
        self, parameter: LocalParameter, name: str
    ) -> tuple[int, tuple[torch.Tensor, ...]]:
        """Return which expert of a Hugging Face tensor (E, ...) a parameter is, and where.

        `tensor[expert][places]` has the parameter's shape: indices that broadcast.  One rank must
        hold the whole model.  Raises CheckpointError if the mapping does more than choose an
        expert and move whole rows and columns.
        """
        shape, first = self.hf_shape(name), self._of_first_expert(parameter)
        key = (type(parameter.mapping), shape, re.sub(r"\d+", "*", name))
        if key not in self._places:
            labels = []
            for dim in range(1, len(shape)):
                view = [1] * len(shape)
                view[dim] = -1
                given = torch.arange(shape[dim]).view(view).expand(1, *shape[1:])
                weights = self._bridge.maybe_modify_loaded_hf_weight(name, {name: given})
                labels.append(self._run_mapping(first, weights, dtype=torch.int64))
            self._places[key] = tuple(_line(label, parameter, name) for label in labels)
        return _number_of(parameter), self._places[key]

    def _of_first_expert(self, parameter: LocalParameter) -> LocalParameter:
        """Return the same parameter as if its expert were the first: its mapping takes (1, ...)."""
        name = re.sub(r"\d+$", "0", parameter.global_name)
        return replace(parameter, mapping=self._registry.megatron_to_hf_lookup(name))

    def _is_one_of_all(self, parameter: LocalParameter) -> bool:
        """Tell whether a Hugging Face tensor holds this expert among all others."""
        name = parameter.mapping.hf_param
        if not parameter.is_expert or not isinstance(name, str) or name not in self.hf_shapes:
            return False
        return self.hf_shapes[name][0] == self._config.num_moe_experts and not re.search(
            r"\.experts\.\d+\.", name
        )

    def _fuse(self, parameter: LocalParameter, labels: list[torch.Tensor]) -> torch.Tensor:
        """Return which label each local row gets; -1 for padding."""
        mapping = parameter.mapping
        rank, size = self.tp_place(parameter)
        if isinstance(mapping, GatedMLPMapping):
            given = dict(zip(mapping.hf_param, labels, strict=True))
            return self._run_mapping(parameter, given, dtype=torch.int64)
        if isinstance(mapping, ConcatenatedGatedMLPMapping):
            return self._run_mapping(parameter, labels[0], dtype=torch.int64)
        whole = labels[0]
        if isinstance(mapping, GDNLinearMapping | GDNLinearMappingSeparate):
            whole = delta_net_rows(self._config, labels, tp_size=size)
        if isinstance(mapping, ConcatenatedQKVMapping):
            whole = merge_qkv_biases(self._config, *_queries_keys_values(self._config, whole))
        if isinstance(mapping, QKVMapping):
            whole = merge_qkv_biases(self._config, *labels)
        return _rows_of_rank(whole, rank, size, parameter.parameter.shape[0])

    def convert(self, parameter: LocalParameter, source: SafetensorsFolder) -> torch.Tensor:
        """Return this rank's value of any parameter by running its mapping on whole tensors."""
        name = parameter.mapping.hf_param
        if self._is_one_of_all(parameter):
            number = _number_of(parameter)
            given: Any = {name: source.slice(name)[number : number + 1]}
            parameter = self._of_first_expert(parameter)
        else:
            given = source
        weights = self._bridge.maybe_modify_loaded_hf_weight(name, given)
        return self._run_mapping(parameter, weights, dtype=parameter.parameter.dtype)

    def _run_mapping(
        self, parameter: LocalParameter, weights: Any, *, dtype: torch.dtype
    ) -> torch.Tensor:
        rank, _ = self.tp_place(parameter)
        with every_rank_is_the_first(rank, dtype):
            result: torch.Tensor = parameter.mapping.hf_to_megatron(weights, parameter.module)
        return result


def _tensors(chunk: torch.nn.Module, modules: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters, and buffers that are saved: a router's correction bias is one."""
    yield from chunk.named_parameters()
    for name, buffer in chunk.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf not in modules[owner]._non_persistent_buffers_set:
            yield name, buffer


def _queries_keys_values(config: Any, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split the rows of a tensor that holds q, k and v."""
    heads, groups = config.num_attention_heads, config.num_query_groups
    return rows.split([n * config.kv_channels for n in (heads, groups, groups)])


def _number_of(parameter: LocalParameter) -> int:
    """Return which of all experts a parameter is."""
    found = re.search(r"\d+$", parameter.global_name)
    assert found is not None
    return int(found[0])


def _line(label: torch.Tensor, parameter: LocalParameter, name: str) -> torch.Tensor:
    """Return the row or column of numbers that is repeated in a label."""
    lines = [label]
    if label.dim() == 2:
        lines = [label.select(1 - dim, 0).unsqueeze(1 - dim) for dim in range(2)]
    for line in lines:
        if torch.equal(line.expand_as(label), label):
            return line
    raise CheckpointError(
        f"{type(parameter.mapping).__name__} does more with {name} than move rows and columns of "
        "one expert, and cannot be undone"
    )


def _rows_of_rank(labels: torch.Tensor, rank: int, size: int, rows: int) -> torch.Tensor:
    """Return labels of rows [rank * rows, (rank + 1) * rows); -1 for rows that are padding."""
    padded = torch.full((rows * size,), -1)
    padded[: labels.shape[0]] = labels
    return padded[rank * rows : (rank + 1) * rows]
