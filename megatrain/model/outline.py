"""One rank's part of a model without its values: names, shapes, places in Megatron's checkpoints.

A parameter is one number seen everywhere (stride 0): a model of any size costs no memory, and its
mappings find a tensor of the right shape on the processor.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.names import LocalParameter, ParameterTable
from megatrain.config.model import ModelConfig
from megatrain.errors import CheckpointError
from megatrain.model.provider import make_bridge, make_provider
from megatrain.parallel.groups import playing
from megatrain.parallel.layout import DeviceMesh
from megatrain.platforms.bridge_import import quiet


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """A parameter of this rank, and how Megatron cuts it for a distributed checkpoint."""

    parameter: LocalParameter
    entry: Any
    """Megatron's ShardedTensor, or ShardedTensorFactory for gate and up in one tensor."""

    def pieces(self, value: Tensor) -> list[Any]:
        """Return ShardedTensors that hold `value`, in a checkpoint's own cut."""
        from megatron.core.dist_checkpointing.mapping import (  # noqa: PLC0415 - patched first
            ShardedTensorFactory,
        )

        if isinstance(self.entry, ShardedTensorFactory):
            built = dataclasses.replace(self.entry, data=value).build()
            return list(built.values()) if isinstance(built, dict) else list(built)
        return [dataclasses.replace(self.entry, data=value, dtype=value.dtype)]

    def merge(self, values: list[Tensor]) -> Tensor:
        """Return the parameter that was cut into these pieces."""
        from megatron.core.dist_checkpointing.mapping import (  # noqa: PLC0415 - patched first
            ShardedTensorFactory,
        )

        if isinstance(self.entry, ShardedTensorFactory):
            whole: Tensor = self.entry.merge_fn(values)
            return whole
        (value,) = values
        return value


@dataclass(frozen=True, slots=True)
class Outline:
    """What one rank of a mesh would hold of a checkpoint's model."""

    bridge: Any
    """AutoBridge's bridge of the family."""
    provider: Any
    table: ParameterTable
    stored: list[StoredParameter]
    objects: list[Any]
    """Megatron's ShardedObjects: what Transformer Engine keeps beside its weights."""


@contextlib.contextmanager
def outline(
    folder: Path,
    mesh: DeviceMesh,
    rank: int,
    hf_shapes: dict[str, tuple[int, ...]],
    *,
    alone: bool = False,
) -> Iterator[Outline]:
    """Give the outline of one rank; its mappings work inside the `with` only.

    `folder` holds the configuration.  alone=True gives the names of checkpoints that keep every
    expert under a name of its own (Megatron's singleton_local_shards).

    Raises UnknownFamilyError or LayoutError; StateError if this process has joined real ranks.
    """
    with playing(mesh, rank) as groups, quiet():
        auto_bridge = make_bridge(folder)
        provider = make_provider(auto_bridge, ModelConfig(mixed_precision="no"), groups)
        provider.use_cpu_initialization = True
        stages = range(mesh.vpp) if mesh.vpp > 1 else [None]
        with torch.device("meta"):
            chunks = [provider.provide(vp_stage=stage) for stage in stages]
        for chunk in chunks:
            _take_memory_away(chunk)
        table = ParameterTable(auto_bridge, chunks, groups, hf_shapes)
        entries = [_entries(chunk, groups, alone=alone) for chunk in chunks]
        stored = [
            StoredParameter(parameter, entry)
            for parameter in table.parameters
            if (entry := _take(entries[parameter.chunk], parameter)) is not None
        ]
        objects = _objects(entries)
        yield Outline(auto_bridge._model_bridge, provider, table, stored, objects)


def _take_memory_away(chunk: torch.nn.Module) -> None:
    """Put a view of one number in the place of every parameter and buffer."""
    for module in chunk.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.nn.Parameter(_one_number(old), requires_grad=False)
                new.__dict__.update(old.__dict__)  # Megatron's marks: partition_dim and so on
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _one_number(buffer)


def _one_number(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


def _entries(chunk: Any, groups: Any, *, alone: bool) -> dict[str, Any]:
    metadata = {"singleton_local_shards": alone, "dp_cp_group": groups.data}
    entries: dict[str, Any] = chunk.sharded_state_dict(metadata=metadata)
    return entries


def _take(entries: dict[str, Any], parameter: LocalParameter) -> Any:
    """Return the entry of a parameter: by its name, or where a family renames, by its storage."""
    if parameter.local_name in entries:
        return entries.pop(parameter.local_name)
    place = _place(parameter.parameter)
    for name, entry in entries.items():
        if isinstance(entry.data, Tensor) and _place(entry.data) == place:
            return entries.pop(name)
    return None


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _objects(entries: list[dict[str, Any]]) -> list[Any]:
    """Return what is no tensor.  Raises CheckpointError for a tensor that has no mapping."""
    from megatron.core.dist_checkpointing.mapping import (  # noqa: PLC0415 - patched first
        ShardedObject,
    )

    rest = {name: entry for chunk in entries for name, entry in chunk.items()}
    unknown = [name for name, entry in rest.items() if not isinstance(entry, ShardedObject)]
    if unknown:
        raise CheckpointError(
            f"Megatron would save {', '.join(unknown[:5])}, which no Hugging Face tensor becomes",
            hint="the family's bridge is incomplete; see bridges/README.md",
        )
    return list(rest.values())
