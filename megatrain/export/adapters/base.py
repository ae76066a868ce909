"""A base checkpoint whose matrices can be added to: plain tensors, whatever form they are in."""

import functools
import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatrain.checkpoint.open import open_checkpoint
from megatrain.checkpoint.quantized import QuantizedFolder, plain_tensors
from megatrain.checkpoint.safetensors_file import TensorSpec
from megatrain.checkpoint.safetensors_folder import INDEX, SafetensorsFolder
from megatrain.errors import ExportError
from megatrain.export.checkpoint import CARRIED

QUANTIZED = "quantization_config"
TEMPLATES = "additional_chat_templates"
"""Transformers' sub-folder for templates beside the default one."""


@dataclass(frozen=True)
class Base:
    """A checkpoint, and its configuration as one that is not quantised."""

    folder: Path
    config: dict[str, Any]
    is_quantized: bool
    stored: SafetensorsFolder
    """Tensors as they are in the files."""
    plain: SafetensorsFolder
    """Dequantised while they are read, in float32."""

    def spec(self, name: str) -> TensorSpec:
        """Return a plain tensor's shape and dtype.

        The dtype is the stored one, or what config.json names where the tensor is dequantised.
        """
        dtype = self._dtype() if self.is_dequantised(name) else self.plain.dtype(name)
        return TensorSpec(dtype, self.plain.shape(name))

    def is_dequantised(self, name: str) -> bool:
        """Tell whether a plain tensor is computed from others while it is read."""
        return name not in self.stored or self.stored.dtype(name) != self.plain.dtype(name)

    @functools.cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """By `kind_of` a tensor's name: the dtype that holds all tensors of that kind."""
        found: dict[str, torch.dtype] = {}
        for name in self.plain:
            dtype, kind = self.spec(name).dtype, kind_of(name)
            found[kind] = torch.promote_types(dtype, found.get(kind, dtype))
        return found

    def file_of(self, name: str) -> str:
        """Return the file that holds a tensor, or what it is dequantised from."""
        if name in self.stored:
            return self.stored.file_of(name)
        return self._files_of_parts[name]

    @functools.cached_property
    def _files_of_parts(self) -> dict[str, str]:
        """The first file that holds a part of a tensor, by plain name: found in one pass."""
        assert isinstance(self.plain, QuantizedFolder)
        files: dict[str, str] = {}
        for stored in self.stored:
            name, file = self.plain.owner(stored), self.stored.file_of(stored)
            files[name] = min(file, files.get(name, file))
        return files

    def _dtype(self) -> torch.dtype:
        text = self.config.get("text_config") or {}
        found = [each.get(key) for each in (self.config, text) for key in ("dtype", "torch_dtype")]
        name = next((each for each in found if each), "bfloat16")
        dtype = getattr(torch, str(name).removeprefix("torch."), torch.bfloat16)
        assert isinstance(dtype, torch.dtype)
        return dtype


def kind_of(name: str) -> str:
    """Return a tensor's name without the numbers of layer and expert."""
    return re.sub(r"\d+", "*", name)


def open_base(folder: Path, *, allow_pickle: bool = False) -> Base:
    """Open a checkpoint; only headers are read.

    Raises CheckpointError for a shard that is missing or damaged, ExportError for its config.json.
    """
    stored = open_checkpoint(folder, allow_pickle=allow_pickle)
    stored.check_index()
    config = read_config(folder)
    found = config.pop(QUANTIZED, None)
    text = config.get("text_config")
    if isinstance(text, dict):
        found = text.pop(QUANTIZED, None) or found
    plain = plain_tensors(SimpleNamespace(quantization_config=found), stored)
    return Base(folder, config, found is not None, stored, plain)


def copy_carried(source: Path, target: Path, *, without: Collection[str] = (INDEX,)) -> None:
    """Copy configuration, tokenizer and chat templates; not weights, and no index of them."""
    files = [path for path in source.iterdir() if path.suffix in CARRIED]
    files += (source / TEMPLATES).glob("*.jinja")
    for path in sorted(files):
        if path.is_file() and path.name not in without:
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json.  Raises ExportError."""
    path = folder / "config.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(f"cannot read {path}: {error}", hint="is this a checkpoint?") from error
