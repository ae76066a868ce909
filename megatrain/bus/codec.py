"""Values as bytes and back: msgpack, with arrays as raw buffers behind it.  No pickle, no torch.

    message  u32 length of the head | head (msgpack) | the arrays' bytes, one after the other

What can travel: None, bool, int, float, str, bytes, list, tuple (becomes a list), dict, numpy
arrays, RawTensor, and the dataclasses that are registered here.
"""

import dataclasses
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import msgpack
import numpy as np

from megatrain.bus.beat import Beat
from megatrain.bus.commands import COMMANDS
from megatrain.errors import BusError, ConfigError
from megatrain.types import AdapterBatch, StepOutput

_ARRAY, _RAW, _RECORD = 1, 2, 3
"""Kinds of msgpack's extension types."""
_SIZE = struct.Struct("<I")
_DEEPEST = 32
"""Extensions in extensions: each costs msgpack 40 KiB of the C stack."""
_KINDS = "biuf"
"""numpy's letters of dtypes that may travel: bool, signed, unsigned, float."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor of a dtype that numpy may not know, as the bytes of its entries in C order."""

    dtype: str
    """As torch calls it: `bfloat16`."""
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it travels."""

    kind: str
    """Name of its class."""
    message: str
    hint: str | None = None
    rank: int | None = None
    host: str = ""
    command: str = ""
    traceback: str = ""


RECORDS: dict[str, type[Any]] = {
    **COMMANDS,
    "AdapterBatch": AdapterBatch,
    "StepOutput": StepOutput,
    "Failure": Failure,
    "Beat": Beat,
}
"""Dataclasses that may travel, by name."""


def encode(value: Any) -> bytes:
    """Return a value as bytes.

    Raises ConfigError, naming the place in the value, for something that cannot travel.
    """
    writer = _Writer()
    try:
        head = writer.pack(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        place, culprit = _culprit(value, "")
        raise ConfigError(
            f"{place or 'the value'} cannot be sent to ranks: {reprlib.repr(culprit)} ({error})",
            hint="send numbers, texts, lists, dicts and arrays; a class or function of a module is "
            "named as 'module:name'",
        ) from error
    return b"".join([_SIZE.pack(len(head)), head, *writer.buffers])


class _Writer:
    """Packs a head, and collects the arrays that go behind it."""

    def __init__(self) -> None:
        self.buffers: list[memoryview] = []
        self._depth = 0

    def pack(self, item: Any) -> bytes:
        if self._depth > _DEEPEST:
            raise ValueError("too deep")
        self._depth += 1
        packed: bytes = msgpack.packb(item, default=self._extend, strict_types=True)
        self._depth -= 1
        return packed

    def _extend(self, item: Any) -> Any:
        return _extend(item, self.buffers, self.pack)


def _extend(item: Any, buffers: list[memoryview], pack: Any) -> Any:
    if type(item) is tuple:
        return list(item)
    if isinstance(item, RawTensor):
        data = memoryview(item.data).cast("B")
        buffers.append(data)
        return msgpack.ExtType(_RAW, pack([item.dtype, list(item.shape), data.nbytes]))
    if dataclasses.is_dataclass(item) and RECORDS.get(type(item).__name__) is type(item):
        fields = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        return msgpack.ExtType(_RECORD, pack([type(item).__name__, fields]))
    if isinstance(item, np.generic):
        return item.item()
    if isinstance(item, PurePath):
        return str(item)
    if isinstance(item, Mapping) and type(item) is not dict:
        return dict(item)
    array = _array(item)
    buffers.append(memoryview(array).cast("B") if array.size else memoryview(b""))
    return msgpack.ExtType(_ARRAY, pack([array.dtype.str, list(array.shape)]))


def _array(item: Any) -> Any:
    """Return a numpy array in C order of what is one, or a torch tensor on the CPU."""
    is_array = isinstance(item, np.ndarray) or (
        hasattr(item, "__array__") and not isinstance(item, type)
    )
    if not is_array:
        raise TypeError(f"a {type(item).__name__} cannot travel")
    array = np.asarray(item)
    if array.dtype.kind not in _KINDS:
        raise TypeError(f"an array of {array.dtype} cannot travel")
    little = array.dtype.newbyteorder("<")
    return np.ascontiguousarray(array, dtype=little).reshape(array.shape)


def _culprit(value: Any, place: str) -> tuple[str, Any]:
    """Return the innermost part of a value that cannot be packed, and where it is."""
    for _ in range(_DEEPEST):
        found = next(((w, p) for w, p in _parts(value, place) if not _is_packable(p)), None)
        if found is None:
            break
        place, value = found
    return place, value


def _parts(value: Any, place: str) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return [(f"{place}.{key}".lstrip("."), part) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [(f"{place}[{index}]", part) for index, part in enumerate(value)]
    return []


def _is_packable(value: Any) -> bool:
    try:
        _Writer().pack(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
    return True


def decode(data: bytes | memoryview) -> Any:
    """Return the value that `encode` made these bytes of; arrays are read-only views of them.

    Raises BusError for anything else.
    """
    view = memoryview(data)
    try:
        (size,) = _SIZE.unpack_from(view)
        if size > len(view) - _SIZE.size:
            raise ValueError(f"a head of {size} bytes in a message of {len(view)}")
        reader = _Buffers(view[_SIZE.size + size :])
        value = reader.unpack(view[_SIZE.size : _SIZE.size + size])
        reader.check_end()
    except BusError:
        raise
    except Exception as error:  # what malformed bytes make of a parser is anything
        raise BusError(f"a message is malformed: {type(error).__name__}: {error}") from error
    return value


class _Buffers:
    """The raw bytes behind a head, taken in order."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._place, self._depth = view, 0, 0

    def unpack(self, head: Any) -> Any:
        if self._depth > _DEEPEST:
            raise ValueError("too deep")
        self._depth += 1
        value = msgpack.unpackb(head, ext_hook=self._read, strict_map_key=False, raw=False)
        self._depth -= 1
        return value

    def _read(self, kind: int, data: bytes) -> Any:
        if kind == _RECORD:
            name, fields = self.unpack(data)
            return _record(name, fields)
        if kind == _RAW:
            dtype, shape, size = self.unpack(data)
            return RawTensor(str(dtype), tuple(int(n) for n in shape), self._take(int(size)))
        if kind != _ARRAY:
            raise ValueError(f"unknown extension {kind}")
        name, shape = self.unpack(data)
        dtype = np.dtype(str(name))
        if dtype.kind not in _KINDS or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"no array of {name} and shape {shape}")
        count = 1
        for size in shape:
            count *= size
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).reshape(shape)

    def _take(self, size: int) -> memoryview:
        if size < 0 or size > len(self._view) - self._place:
            raise ValueError(f"an array of {size} bytes, and {len(self._view) - self._place} left")
        self._place += size
        return self._view[self._place - size : self._place].toreadonly()

    def check_end(self) -> None:
        if self._place != len(self._view):
            raise ValueError(f"{len(self._view) - self._place} bytes too many")


def _record(name: str, fields: dict[str, Any]) -> Any:
    kind = RECORDS.get(name)
    if kind is None:
        raise ValueError(f"unknown record {name!r}")
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"{name} has no fields {unknown}")
    return kind(**fields)
