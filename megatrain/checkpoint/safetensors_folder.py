"""A folder of safetensors files as one mapping from names to tensors, read lazily and in slices."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatrain.checkpoint.safetensors_file import DTYPES
from megatrain.errors import CheckpointError

INDEX = "model.safetensors.index.json"


class MissingTensorError(CheckpointError, KeyError):
    """A checkpoint lacks a tensor.  Also a KeyError, which bridges expect of a mapping."""

    __str__ = Exception.__str__


class SafetensorsFolder(Mapping[str, torch.Tensor]):
    """Tensors of a Hugging Face checkpoint.  Files are mapped, not read; nothing is kept."""

    index_name = INDEX
    pattern = "*.safetensors"

    def __init__(self, folder: Path, files: Sequence[str] | None = None) -> None:
        """Open the checkpoint in a folder, or just these files of it."""
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._files = self._read_index() if files is None else self._names_in(files)

    def _names_in(self, files: Sequence[str]) -> dict[str, str]:
        return {key: name for name in files for key in self._file(name).keys()}  # noqa: SIM118

    def _read_index(self) -> dict[str, str]:
        index = self.folder / self.index_name
        if index.is_file():
            return self._from_index(index)
        names = sorted(path.name for path in self.folder.glob(self.pattern))
        if not names:
            raise CheckpointError(
                f"no {self.pattern} in {self.folder}",
                hint="of a repository that has pickled weights alone (*.bin), `megatrain convert "
                "import --allow-pickle`, then `convert export` make safetensors",
            )
        return self._names_in(names)

    def _from_index(self, index: Path) -> dict[str, str]:
        try:
            files: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"not a safetensors index: {index}: {error}") from error
        if not all(isinstance(each, str) for pair in files.items() for each in pair):
            raise CheckpointError(f"not a safetensors index: {index}: names and files are texts")
        outside = sorted(name for name in set(files.values()) if Path(name).name != name)
        if outside:
            raise CheckpointError(
                f"{index} names files outside its folder: {', '.join(outside[:5])}",
                hint="shards lie beside their index; nothing else is read",
            )
        missing = sorted(name for name in set(files.values()) if not (self.folder / name).is_file())
        if missing:
            raise CheckpointError(
                f"{len(missing)} shard(s) named by {index} are missing: {', '.join(missing[:5])}",
                hint="download the checkpoint again",
            )
        return files

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"cannot read shard {path}: {error}", hint="download it again"
                ) from error
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def slice(self, key: str) -> Any:
        """Return a lazy view: `.get_shape()`, and indexing reads just that part."""
        if key not in self._files:
            raise MissingTensorError(
                f"no tensor {key!r} in {self.folder}",
                hint="the checkpoint does not fit its config.json",
            )
        try:
            return self._file(self._files[key]).get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(
                f"shard {self._files[key]} of {self.folder} lacks {key!r}: {error}",
                hint="the index and the shards do not belong together",
            ) from error

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self.slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype without reading it.

        Raises CheckpointError for one that torch has no name for.
        """
        name = str(self.slice(key).get_dtype())
        if name not in DTYPES:
            raise CheckpointError(f"{key} in {self.folder} has the dtype {name}, unknown here")
        return DTYPES[name]

    def file_of(self, key: str) -> str:
        """Return the name of the file that holds a tensor."""
        return self._files[key]

    def check_index(self) -> None:
        """Raise CheckpointError if the index names tensors that its files have not, or not all."""
        for name in sorted(set(self._files.values())):
            there = set(self._file(name).keys())
            named = {key for key, file in self._files.items() if file == name}
            if named != there:
                wrong = sorted(named ^ there)
                raise CheckpointError(
                    f"the index and {self.folder / name} differ in {len(wrong)} tensor(s): "
                    f"{', '.join(wrong[:5])}",
                    hint="the index and the shards do not belong together; download both again",
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor; only the files' headers are read."""
        return {key: self.shape(key) for key in self}

    def __getitem__(self, key: str) -> torch.Tensor:
        view: torch.Tensor = self.slice(key)[...] if self.shape(key) else self._scalar(key)
        return view

    def _scalar(self, key: str) -> torch.Tensor:
        value: torch.Tensor = self._file(self._files[key]).get_tensor(key)
        return value
