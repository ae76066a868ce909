"""The headers of safetensors files, checked without trust: no value is read, no library is asked.

Nothing here needs torch, and any dtype that a header names is kept by that name.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatrain.errors import CheckpointError

BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Of one entry, by the name that a header gives the dtype."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's values are, and what they are."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    num_bytes: int

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[bytes]:
        """Yield its values as bytes, one block after the other."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.num_bytes
            while left:
                block = file.read(min(size, left))
                if not block:
                    raise CheckpointError(f"cut short while it was read: {self.path}")
                left -= len(block)
                yield block


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of all safetensors files of a folder, by name.

    With an index, exactly what it names: raises CheckpointError for an index that names files
    outside the folder, shards that are missing, or tensors that its shards lack or hold elsewhere.
    Without one, raises it for a name that two files have, and if there is no file.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise CheckpointError(f"{folder} has several indexes: {', '.join(i.name for i in indexes)}")
    if indexes:
        return _read_indexed(folder, indexes[0])
    found: dict[str, StoredTensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"no *.safetensors in {folder}")
    for file in files:
        tensors = read_file(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(
                f"{len(twice)} tensor(s) are in {file.name} and in another file of {folder}: "
                f"{', '.join(twice[:5])}"
            )
        found |= tensors
    return found


def _read_indexed(folder: Path, index: Path) -> dict[str, StoredTensor]:
    names = _read_index(index)
    files = sorted(set(names.values()))
    for file in files:
        place = PurePosixPath(file)
        if place.is_absolute() or ".." in place.parts:
            raise CheckpointError(
                f"{index} names a file outside its folder: {file}",
                hint="do not use this checkpoint",
            )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(files)} shard(s) that {index} names are missing: "
            f"{', '.join(missing[:5])}",
            hint="download the checkpoint again",
        )
    shards = {file: read_file(folder / file) for file in files}
    absent = sorted(name for name, file in names.items() if name not in shards[file])
    if absent:
        raise CheckpointError(
            f"{index} names {len(absent)} tensor(s) that their shards lack: "
            f"{', '.join(f'{name} in {names[name]}' for name in absent[:5])}",
            hint="the index and the shards do not belong together",
        )
    extra = sorted({name for tensors in shards.values() for name in tensors} - names.keys())
    if extra:
        raise CheckpointError(
            f"{len(extra)} tensor(s) are in shards, but not in {index}: {', '.join(extra[:5])}",
            hint="the index and the shards do not belong together",
        )
    return {name: shards[file][name] for name, file in names.items()}


def _read_index(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(file, str) for file in names.values()):
            raise TypeError("a file's name must be a string")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"not a safetensors index: {index}: {error!r}") from error
    return dict(names)


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file in the order of their values.

    Raises CheckpointError for a header that is cut short or is none, and unless the tensors fill
    the rest of the file without gap or overlap.
    """
    try:
        header, base, size = _read_header(path)
        tensors = [_tensor(path, name, entry, base) for name, entry in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"not a safetensors file: {path}: {error!r}") from error
    tensors.sort(key=lambda tensor: tensor.start)
    end = base
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointError(f"{path}: {tensor.name} does not begin where the last one ends")
        end += tensor.num_bytes
    if end != size:
        raise CheckpointError(
            f"cut short or altered: {path} has {size} bytes; its header describes {end}",
            hint="download or write it again",
        )
    return {tensor.name: tensor for tensor in tensors}


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"cut short: {path} has {size} bytes; its header alone should have {length} and 8",
                hint="download or write it again",
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"a header may have {MAX_HEADER_BYTES} bytes; that of {path} has {length}"
            )
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length, size


def _tensor(path: Path, name: str, entry: Mapping[str, Any], base: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise CheckpointError(f"{path}: {name} has offsets or a shape that are none: {entry}")
    bits = BITS.get(entry["dtype"])
    if bits is None:
        raise CheckpointError(f"{path}: {name} has an unknown dtype: {entry['dtype']!r}")
    if (end - start) * 8 != math.prod(shape) * bits:
        raise CheckpointError(
            f"{path}: {name} is {entry['dtype']} {list(shape)}, but has {end - start} bytes"
        )
    return StoredTensor(name, path, entry["dtype"], shape, base + start, end - start)
