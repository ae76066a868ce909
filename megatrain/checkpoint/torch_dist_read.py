"""Read tensors of a Megatron distributed checkpoint (torch_dist), whole or in blocks, one by one.

Whoever wrote it, and on whatever layout: a block is put together from the pieces that meet it.
Values are read with torch's weights_only unpickler.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatrain.checkpoint.torch_dist_metadata import find_checkpoint, read_metadata
from megatrain.errors import CheckpointError

Box = tuple[tuple[int, int], ...]
"""First and one past the last index along each dimension."""


class TorchDistFolder:
    """Tensors of one iteration by Megatron's names."""

    def __init__(self, folder: Path) -> None:
        found = find_checkpoint(folder)
        if found is None:
            raise CheckpointError(
                f"no Megatron distributed checkpoint in {folder}",
                hint="one has .metadata and *.distcp files, maybe in iter_0000000",
            )
        self.folder = found
        metadata = read_metadata(found)
        self._storage: dict[MetadataIndex, Any] = metadata.storage_data or {}
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype.  Raises CheckpointError if there is no such tensor."""
        dtype: torch.dtype = self._entry(key).properties.dtype
        return dtype

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self.tensors:
            raise CheckpointError(
                f"{self.folder} has no tensor {key!r}",
                hint="it is of another model than the configuration says",
            )
        return self.tensors[key]

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return the block of a tensor that begins at `offset`.

        Raises CheckpointError if the tensor is absent or smaller, the pieces do not cover the
        block, or a file is damaged.
        """
        entry = self._entry(key)
        wanted = _box(offset, shape)
        if len(entry.size) != len(wanted) or any(
            stop > size for (_, stop), size in zip(wanted, entry.size, strict=True)
        ):
            raise CheckpointError(
                f"{key} has shape {tuple(entry.size)} in {self.folder}; the model wants "
                f"{tuple(shape)} at {tuple(offset)}",
                hint="it is of another model than the configuration says",
            )
        meeting = [c for c in entry.chunks if _meet(_box(c.offsets, c.sizes), wanted) is not None]
        if len(meeting) == 1 and _box(meeting[0].offsets, meeting[0].sizes) == wanted:
            return self._load(key, meeting[0])
        result = torch.empty(tuple(shape), dtype=entry.properties.dtype)
        covered = 0
        for chunk in meeting:
            box = _box(chunk.offsets, chunk.sizes)
            common = _meet(box, wanted)
            assert common is not None
            part = self._load(key, chunk)[_within(common, box)]
            result[_within(common, wanted)] = part
            covered += part.numel()
        if covered != result.numel():
            raise CheckpointError(
                f"{covered} of {result.numel()} values of {key} are in {self.folder}",
                hint="the checkpoint was not finished, or ranks' files are missing",
            )
        return result

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise CheckpointError(f"{self.folder} does not say where {key} at {chunk.offsets} is")
        path = self.folder / info.relative_path
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{path} is compressed, which is not supported")
        try:
            value = _mapped(path, info.offset, info.length)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"cut short or altered: {path}, where {key} should be: {error}",
                hint="copy the checkpoint again",
            ) from error
        if not isinstance(value, Tensor) or value.shape != torch.Size(chunk.sizes):
            raise CheckpointError(f"{path} does not hold {key} of shape {tuple(chunk.sizes)}")
        return value


def _mapped(path: Path, offset: int, length: int) -> Any:
    """Return what torch.save wrote there; a tensor's values are mapped, not read.

    torch itself unpickles a tensor without values, and tells where in the file they are.
    """
    with path.open("rb") as file, FakeTensorMode():
        view: Any = _create_file_view(file, offset, length)
        found = torch.load(view, weights_only=True)
    if not isinstance(found, Tensor):
        return found
    storage: Any = found.untyped_storage()
    start = int(storage._checkpoint_offset)
    if start + storage.nbytes() > length:
        raise ValueError(f"{storage.nbytes()} bytes at {start} do not fit into {length}")
    if not storage.nbytes():
        return torch.empty(found.shape, dtype=found.dtype)
    place = np.memmap(path, np.uint8, "c", offset + start, (int(storage.nbytes()),))
    values = torch.from_numpy(place).view(found.dtype)
    return values.as_strided(found.shape, found.stride(), found.storage_offset())


def _box(offset: Sequence[int], shape: Sequence[int]) -> Box:
    return tuple((first, first + size) for first, size in zip(offset, shape, strict=True))


def _meet(one: Box, other: Box) -> Box | None:
    """Return what two boxes have in common, None if that is nothing."""
    pairs = zip(one, other, strict=True)
    common = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in pairs)
    return common if all(first < stop for first, stop in common) else None


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Return where a box lies inside another one."""
    return tuple(
        slice(first - start, stop - start)
        for (first, stop), (start, _) in zip(box, outer, strict=True)
    )
