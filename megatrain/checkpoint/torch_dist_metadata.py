"""`.metadata` of a Megatron distributed checkpoint (torch_dist): a pickle, read without running it.

Only the classes that torch.distributed.checkpoint itself writes there can come out of it; they are
plain records.  Nothing else is imported, let alone called.
"""

import io
import pathlib
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from megatrain.errors import CheckpointError

FILE = ".metadata"
LATEST = "latest_checkpointed_iteration.txt"
"""Beside Megatron's folders iter_0000010: the number of the newest, or `release`."""

_LAYOUTS = {str(layout): layout for layout in (torch.strided, torch.sparse_coo)}


def _layout(name: str) -> torch.layout:
    """Stand in for torch's function, which looks through all of torch."""
    found: torch.layout = _LAYOUTS[name]
    return found


_RECORDS = {
    metadata: (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    filesystem: ("_StorageInfo",),
    planner: ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
}
_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("collections", "OrderedDict"): dict,
    # A path is where the checkpoint was written; it is never followed.
    **{("pathlib", name): PurePosixPath for name in ("PosixPath", "PurePosixPath", "Path")},
    **{("pathlib", name): pathlib.PureWindowsPath for name in ("WindowsPath", "PureWindowsPath")},
    **{(m.__name__, name): getattr(m, name) for m, names in _RECORDS.items() for name in names},
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of _ALLOWED and torch's dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle names.  Raises CheckpointError for anything that is not allowed."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise CheckpointError(
            f"{FILE} of a checkpoint holds nothing but torch.distributed.checkpoint's records; "
            f"this one asks for {module}.{name}",
            hint="nothing of it was run; do not load this checkpoint with a tool that would",
        )


def read_metadata(folder: Path) -> Metadata:
    """Return what a torch_dist checkpoint says of its tensors; no tensor is read.

    Raises CheckpointError for a folder without one, a pickle that is cut short or names another
    class, and values that lie in files outside the folder or in files that are missing.
    """
    path = folder / FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"no torch_dist checkpoint in {folder}: {error}",
            hint=f"one has {FILE} and *.distcp; `find_checkpoint` looks into iter_0000010 folders",
        ) from error
    try:
        found = _Unpickler(io.BytesIO(data)).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from error
    except Exception as error:
        # A damaged pickle raises nearly anything: an index, a type, an attribute, the end.
        raise CheckpointError(f"cut short or altered: {path}: {error!r}") from error
    _check(path, found)
    return found


def find_checkpoint(folder: Path) -> Path | None:
    """Return the folder that has `.metadata`: this one, or the latest iter_* in it; None if none.

    Raises CheckpointError if the latest iteration is named and not there.
    """
    if (folder / FILE).is_file():
        return folder
    latest = folder / LATEST
    if not latest.is_file():
        return None
    name = latest.read_text().strip()
    if name != "release" and not name.isdecimal():
        raise CheckpointError(f"{latest} must hold a number or `release`: {name!r}")
    iteration = folder / (f"iter_{int(name):07d}" if name.isdecimal() else name)
    if not (iteration / FILE).is_file():
        raise CheckpointError(
            f"{latest} names {iteration.name}, which has no {FILE}",
            hint="a checkpoint of another format than torch_dist, or one that was not finished",
        )
    return iteration


def _check(path: Path, found: Any) -> None:
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise CheckpointError(f"{path} holds no Metadata but {type(found).__name__}")
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise CheckpointError(
                f"{path}: {name} is {type(entry).__name__}, not a tensor or bytes"
            )
    if not isinstance(found.storage_data or {}, dict):
        raise CheckpointError(f"{path}: storage_data is {type(found.storage_data).__name__}")
    for info in (found.storage_data or {}).values():
        numbers = [getattr(info, "offset", None), getattr(info, "length", None)]
        if not all(type(each) is int and each >= 0 for each in numbers):
            raise CheckpointError(f"{path}: a place in a file is no number: {numbers}")
    for file in sorted(set(_files(found))):
        place = PurePosixPath(file)
        if place.is_absolute() or ".." in place.parts:
            raise CheckpointError(f"{path} names a file outside its folder: {file}")
        if not (path.parent / place).is_file():
            raise CheckpointError(
                f"{path} names a file that is missing: {file}", hint="copy the checkpoint again"
            )


def _files(found: Metadata) -> Iterator[str]:
    for info in (found.storage_data or {}).values():
        yield str(getattr(info, "relative_path", ""))
