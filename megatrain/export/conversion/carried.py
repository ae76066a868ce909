"""What goes along with weights through Megatron and back: configuration, tokenizer, names.

It lies in the folder `hugging_face` of a Megatron checkpoint, with `tensors.json`: each tensor's
dtype, shape and file as they were, so that an export gives back what was imported.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatrain.checkpoint.safetensors_file import NAMES, TensorSpec
from megatrain.checkpoint.safetensors_folder import INDEX
from megatrain.errors import CheckpointError
from megatrain.export.adapters.base import Base, copy_carried

FOLDER, TENSORS, CONVERSION = "hugging_face", "tensors.json", "conversion.json"
LEFT_OUT = "left_out.safetensors"
"""Tensors for which Megatron's model has no place, an image tower's say, as they were."""


@dataclass(frozen=True, slots=True)
class Original:
    """One tensor of a Hugging Face checkpoint."""

    spec: TensorSpec
    file: str


Originals = Mapping[str, Original]


@dataclass(frozen=True, slots=True)
class Written:
    """What a conversion consists of; every process that shares it finds the same."""

    files: tuple[str, ...]
    """All that must be there in the end, whoever writes them."""
    left_out: tuple[str, ...]
    """Tensors that Megatron's model has no place for."""


def originals_of(source: Base) -> dict[str, Original]:
    """Return every tensor of a checkpoint as it is, dequantised; only headers are read."""
    return {
        name: Original(source.spec(name), _safetensors(source.file_of(name)))
        for name in source.plain
    }


def _safetensors(file: str) -> str:
    """Return the name that Transformers gives the file of pickled weights in safetensors."""
    name = Path(file)
    if name.suffix == ".bin":
        return f"{name.stem.removeprefix('pytorch_')}.safetensors"
    return file


def copy_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and templates; not weights, nor lists of them."""
    target.mkdir(exist_ok=True)
    copy_carried(source, target, without=(INDEX, TENSORS, CONVERSION))


def write_originals(folder: Path, originals: Originals) -> None:
    """Write tensors.json."""
    content = {
        name: {
            "dtype": str(each.spec.dtype).removeprefix("torch."),
            "shape": list(each.spec.shape),
            "file": each.file,
        }
        for name, each in originals.items()
    }
    (folder / TENSORS).write_text(json.dumps(content, indent=0))


def read_originals(folder: Path) -> dict[str, Original] | None:
    """Return what tensors.json says; None if there is none.  Raises CheckpointError."""
    path = folder / TENSORS
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if not content:
            raise ValueError("it names no tensor")
        return {
            name: Original(
                TensorSpec(dtype_named(each["dtype"]), tuple(map(int, each["shape"]))),
                _file(each["file"]),
            )
            for name, each in content.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cut short or altered: {path}: {error!r}") from error


def cast_originals(originals: Originals, dtype: torch.dtype) -> dict[str, Original]:
    """Return the same tensors, those of floating point in another dtype."""
    return {
        name: Original(TensorSpec(dtype, each.spec.shape), each.file)
        if each.spec.dtype.is_floating_point
        else each
        for name, each in originals.items()
    }


def set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Say in a config.json that weights are of another dtype.  Raises CheckpointError."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of this name in torch.  Raises ValueError if safetensors has none such."""
    dtype = vars(torch).get(name)
    if dtype not in NAMES:
        raise ValueError(f"no dtype of safetensors: {name}")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _file(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
        raise ValueError(f"not the name of a safetensors file: {name!r}")
    return name
