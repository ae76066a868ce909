"""Tensors of requests, protobuf or JSON, dense or sparse (CSR), as dense arrays of numpy.

Nothing is allocated before its size is known to be allowed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.errors import DataError
from megatrain.service.wire import tinker_wire_pb2 as wire
from megatrain.service.wire.types import Array, IntArray

_STORED: dict[int, np.dtype[Any]] = {
    wire.DTYPE_FLOAT32: np.dtype("<f4"),
    wire.DTYPE_INT64: np.dtype("<i8"),
    wire.DTYPE_INT32: np.dtype("<i4"),
    wire.DTYPE_BFLOAT16: np.dtype("<u2"),
}
_NAMED: dict[object, type[np.float32] | type[np.int64]] = {
    "float32": np.float32,
    "int64": np.int64,
}
MAX_DIMS = 2


@dataclass(slots=True)
class Room:
    """How many cells of dense arrays a request may still take."""

    cells: int

    def take(self, what: str, shape: Sequence[int]) -> None:
        """Raise DataError where an array of this shape has no room."""
        size = prod(shape)
        if size > self.cells:
            raise DataError(
                f"{what} of shape {list(shape)} is too large: {self.cells} numbers are left of what"
                " a request may hold",
                hint="send fewer data in a request",
            )
        self.cells -= size


def array_of_bytes(what: str, data: bytes, dtype: int) -> Array:
    """Return little-endian bytes of a DType as float32 or int64 [n].  Raises DataError."""
    stored = _STORED.get(dtype)
    if stored is None:
        raise DataError(f"{what} has dtype {dtype}, which is not one of {sorted(_STORED)}")
    if len(data) % stored.itemsize:
        raise DataError(f"{what} has {len(data)} bytes, not a multiple of {stored.itemsize}")
    flat: npt.NDArray[Any] = np.frombuffer(data, dtype=stored)
    if dtype == wire.DTYPE_BFLOAT16:  # the upper half of a float32
        result: Array = (flat.astype(np.uint32) << 16).view(np.float32)
        return result
    return flat.astype(np.int64) if dtype == wire.DTYPE_INT32 else flat


def tensor_of_proto(what: str, tensor: wire.Tensor, room: Room) -> Array:
    """Return a tensor of protobuf, dense: float32 or int64, at most two dims.  Raises DataError."""
    shape = list(tensor.shape) or None
    if tensor.WhichOneof("encoding") != "sparse_csr":
        return _shaped(what, array_of_bytes(what, tensor.dense, tensor.dtype), shape, room)
    csr = tensor.sparse_csr
    values = array_of_bytes(what, csr.values, tensor.dtype)
    crow = array_of_bytes(what, csr.crow_indices, wire.DTYPE_INT64)
    col = array_of_bytes(what, csr.col_indices, wire.DTYPE_INT64)
    return dense_of_csr(what, values, crow.astype(np.int64), col.astype(np.int64), shape, room)


def tensor_of_json(what: str, value: Any, room: Room, *, fill: int = 0) -> Array:
    """Return a tensor of JSON ({data, dtype, shape?, sparse_crow_indices?, ...}), dense.

    `fill` is what cells have that a sparse one leaves out.  Raises DataError.
    """
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise DataError(f'{what} must be a tensor, {{"data": [...], "dtype": "int64"}}')
    name = value.get("dtype")
    kind = _NAMED.get(name) if isinstance(name, str) else None
    if kind is None:
        raise DataError(f"{what} has dtype {str(name)[:40]!r}, which is not float32 or int64")
    data = array_of_numbers(what, value["data"], kind)
    shape = value.get("shape")
    if shape is not None:
        shape = array_of_numbers(f"the shape of {what}", shape, np.int64).tolist()
    crow, col = value.get("sparse_crow_indices"), value.get("sparse_col_indices")
    if crow is None and col is None:
        return _shaped(what, data, shape, room)
    indices = [array_of_numbers(f"the indices of {what}", each, np.int64) for each in (crow, col)]
    return dense_of_csr(what, data, *_ints(indices), shape, room, fill=fill)


def _ints(arrays: Sequence[Array]) -> tuple[IntArray, IntArray]:
    first, second = arrays
    return first.astype(np.int64), second.astype(np.int64)


def array_of_numbers(what: str, values: Any, kind: type[np.float32] | type[np.int64]) -> Array:
    """Return a JSON list of numbers as an array [n].  Raises DataError."""
    wanted = (int,) if kind is np.int64 else (int, float)
    # A bool is an int to Python; a list of lists would make an array of other dimensions.
    if not isinstance(values, list) or not all(type(each) in wanted for each in values):
        raise DataError(f"{what} must be a flat list of {kind.__name__} numbers")
    try:
        with np.errstate(over="ignore"):  # what has no room in float32 is inf, and refused as such
            if kind is np.int64:
                return np.array(values, dtype=np.int64)
            return np.array(values, dtype=np.float32)
    except OverflowError as error:
        raise DataError(f"{what} has a number without room in {kind.__name__}") from error


def dense_of_csr(
    what: str,
    values: Array,
    crow: IntArray,
    col: IntArray,
    shape: Sequence[int] | None,
    room: Room,
    *,
    fill: int = 0,
) -> Array:
    """Return a sparse matrix [rows, columns] as a dense one.  Raises DataError."""
    rows, columns = csr_cells(what, len(values), crow, col, shape, room)
    assert shape is not None
    result: Array = np.full(shape, fill, dtype=values.dtype)
    result[rows, columns] = values
    return result


def csr_cells(
    what: str,
    count: int,
    crow: IntArray,
    col: IntArray,
    shape: Sequence[int] | None,
    room: Room,
) -> tuple[IntArray, IntArray]:
    """Return row and column of each of `count` listed cells, checked.  Raises DataError."""
    if shape is None or len(shape) != 2 or min(shape) < 0:
        raise DataError(f"{what} is sparse, so its shape must be [rows, columns]")
    room.take(what, shape)
    if len(crow) != shape[0] + 1 or len(col) != count:
        raise DataError(
            f"{what} of shape {list(shape)} has {len(crow)} row pointers, {len(col)} column indices"
            f" and {count} values"
        )
    steps = np.diff(crow)
    if crow[0] != 0 or crow[-1] != count or (steps < 0).any():
        raise DataError(f"{what} has row pointers that do not rise from 0 to {count}")
    if count and (col.min() < 0 or col.max() >= shape[1]):
        raise DataError(f"{what} has a column index outside [0, {shape[1]})")
    rows = np.repeat(np.arange(shape[0], dtype=np.int64), steps)
    if (np.diff(rows * shape[1] + col) <= 0).any():
        raise DataError(f"{what} has column indices that do not rise within a row")
    return rows, col


def _shaped(what: str, flat: Array, shape: Sequence[int] | None, room: Room) -> Array:
    if shape is None:
        shape = [len(flat)]
    if len(shape) > MAX_DIMS or min(shape, default=0) < 0 or prod(shape) != len(flat):
        raise DataError(
            f"{what} has {len(flat)} numbers, which do not make up shape {list(shape)[:8]}"
            f" (at most {MAX_DIMS} dimensions)"
        )
    room.take(what, shape)
    return flat.reshape(shape)
