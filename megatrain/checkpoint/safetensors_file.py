"""Write one safetensors file tensor by tensor, so that no more than one is in memory.

The library's own writer wants all tensors of a file at once.  The format is that of
https://github.com/huggingface/safetensors: eight bytes of length, a JSON header, the values.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megatrain.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the name that a header gives them."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor will be, before its values are known."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's values as they are in memory; CPU only."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_tensors(
    path: Path, specs: Mapping[str, TensorSpec], value_of: Callable[[str], Tensor]
) -> str:
    """Write a new file, asking for one value after the other; return its XXH3-64 in hexadecimal.

    Raises CheckpointError, with the file half written, if a value is not what was announced.
    """
    header = _header(specs)
    digest = xxhash.xxh3_64(header)
    with path.open("wb") as file:
        file.write(header)
        for name, spec in specs.items():
            value = value_of(name)
            if value.dtype != spec.dtype or tuple(value.shape) != spec.shape:
                raise CheckpointError(
                    f"{name} is {value.dtype} {tuple(value.shape)}, but {spec.dtype} {spec.shape} "
                    "was planned",
                    hint="the source changed while it was read, or is not what its headers say",
                )
            data = raw_bytes(value)
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    """Return length and header, padded with spaces so that values begin on 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, spec in specs.items():
        end = start + spec.num_bytes
        entries[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
