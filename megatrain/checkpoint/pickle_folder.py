"""A checkpoint of pickled weights (pytorch_model*.bin), behind the door of a safetensors folder.

Only where it was asked for.  Torch's weights_only unpickler reads it: tensors come out of it, and
nothing else can.  Files are mapped, not read.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.safetensors_file import NAMES
from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.errors import CheckpointError

UNPICKLE = (
    "`megatrain convert import --allow-pickle`, then `megatrain convert export` make safetensors "
    "of them; only tensors are unpickled"
)
"""What a user of pickled weights can do."""


class PickleFolder(SafetensorsFolder):
    """Tensors of pytorch_model.bin, or of the shards that its index names."""

    index_name = "pytorch_model.bin.index.json"
    pattern = "pytorch_model*.bin"

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            try:
                mapped = zipfile.is_zipfile(path)  # the format before torch 1.6 cannot be mapped
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except pickle.UnpicklingError as error:
                raise CheckpointError(
                    f"cannot read shard {path}: it holds something else than tensors; nothing of "
                    "it was run"
                ) from error
            except (OSError, RuntimeError, EOFError, ValueError) as error:
                raise CheckpointError(f"cannot read shard {path}: {error}") from error
            self._open[name] = _Pickled(path, found)
        return self._open[name]


class _Pickled:
    """What safetensors gives for an open file, of a dictionary of tensors."""

    def __init__(self, path: Path, found: Any) -> None:
        wrong = not isinstance(found, dict) or [
            key for key, value in found.items() if not isinstance(value, Tensor)
        ]
        if wrong:
            raise CheckpointError(f"{path} holds something else than tensors by name")
        self._tensors: dict[str, Tensor] = found

    def keys(self) -> list[str]:
        """Return the names."""
        return list(self._tensors)

    def get_tensor(self, key: str) -> Tensor:
        """Return one tensor."""
        return self._tensors[key].clone()

    def get_slice(self, key: str) -> Any:
        """Return a view that is read when it is indexed."""
        return _Slice(self._tensors[key])


class _Slice:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Return its dtype as safetensors calls it."""
        return NAMES.get(self._tensor.dtype, str(self._tensor.dtype))

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor[index].clone()
