"""Write a Megatron distributed checkpoint (torch_dist) piece by piece, on any number of processes.

The format is that of torch.distributed.checkpoint, with the version fixed here: each *.distcp file
holds results of torch.save one after the other; `.metadata`, a pickle, says which piece of which
tensor lies where.  Its own writer wants all tensors of a process at once.
"""

import io
import json
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatrain.checkpoint.torch_dist_metadata import FILE

CONFIG = "metadata.json"
"""By which Megatron recognises a distributed checkpoint."""
VERSION = "1.0.0"
"""Of the planner's format, as torch 2.13 writes it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor of the whole checkpoint."""

    key: str
    full_shape: tuple[int, ...]
    offset: tuple[int, ...]
    value: Tensor
    """With as many dimensions as the whole."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Something that is no tensor."""

    key: str
    value: Any


def write_pieces(path: Path, pieces: Iterable[Piece | Blob]) -> tuple[str, list[list[Any]]]:
    """Write one .distcp file; return its XXH3-64 and what `write_metadata` needs, as JSON.

    One piece is in memory at a time.
    """
    records: list[list[Any]] = []
    with path.open("wb") as file:
        stream: Any = _Hashing(file)
        for piece in pieces:
            start = stream.tell()
            if isinstance(piece, Blob):
                stream.save(piece.value)
                records.append([piece.key, None, start, stream.tell() - start])
                continue
            stream.save(_own_storage(piece.value))
            place = {
                "dtype": str(piece.value.dtype).removeprefix("torch."),
                "size": list(piece.full_shape),
                "offset": list(piece.offset),
                "shape": list(piece.value.shape),
            }
            records.append([piece.key, place, start, stream.tell() - start])
    return stream.digest.hexdigest(), records


def write_metadata(folder: Path, records: Iterable[tuple[str, list[Any]]]) -> None:
    """Write `.metadata` and metadata.json from (file name, record) of every piece."""
    state: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, (key, place, start, length) in sorted(records, key=lambda r: (r[1][0], r[0])):
        index = MetadataIndex(key, place and place["offset"])
        storage[index] = _StorageInfo(name, start, length)
        if place is None:
            state[key] = BytesStorageMetadata()
            continue
        entry = state.setdefault(
            key,
            TensorStorageMetadata(
                TensorProperties(getattr(torch, place["dtype"])), torch.Size(place["size"]), []
            ),
        )
        entry.chunks.append(
            ChunkStorageMetadata(torch.Size(place["offset"]), torch.Size(place["shape"]))
        )
    meta = Metadata(
        state_dict_metadata=state,
        planner_data={key: (key,) for key in state},
        storage_data=storage,
        storage_meta=StorageMeta(checkpoint_id=None, save_id=None),
        version=VERSION,
    )
    (folder / FILE).write_bytes(pickle.dumps(meta))
    (folder / CONFIG).write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )


def _own_storage(value: Tensor) -> Tensor:
    """Return the tensor on storage of its own size: torch.save writes all of a view's storage."""
    value = value.detach().contiguous()
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone()


class _Hashing(io.RawIOBase):
    """A file that is only appended to, and what was written so far in one checksum."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file, self._position = file, 0
        self._failure: OSError | None = None
        self.digest = xxhash.xxh3_64()

    def save(self, value: Any) -> None:
        """Append what torch.save makes of a value.

        Raises the OSError of a full disk; torch itself raises a RuntimeError that hides it.
        """
        stream: Any = self
        try:
            torch.save(value, stream)
        except RuntimeError as error:
            if self._failure is None:
                raise
            raise self._failure from error

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Append, and take into the checksum."""
        self.digest.update(data)
        self._position += memoryview(data).nbytes
        try:
            return self._file.write(data)
        except OSError as error:
            self._failure = error
            raise

    def tell(self) -> int:
        """Return the number of bytes so far."""
        return self._position

    def flush(self) -> None:
        """Pass on what is buffered."""
        self._file.flush()


def cut(entries: Iterable[Any]) -> Iterator[Piece]:
    """Turn Megatron's ShardedTensors, with their values, into pieces; replicas are left out."""
    from megatron.core.dist_checkpointing.mapping import (  # noqa: PLC0415 - patched first
        is_main_replica,
    )

    for entry in entries:
        if is_main_replica(entry.replica_id):
            shape = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
            yield Piece(entry.key, entry.global_shape, entry.global_offset, entry.data.view(shape))
