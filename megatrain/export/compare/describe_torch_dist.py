"""What a Megatron distributed checkpoint (torch_dist) says of itself; no tensor is read."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatrain.checkpoint.torch_dist_metadata import find_checkpoint, read_metadata
from megatrain.errors import CheckpointError, LayoutError
from megatrain.export.compare.describe import Description, TensorLine
from megatrain.export.compare.place import Place, read_json
from megatrain.export.conversion.carried import CONVERSION, FOLDER
from megatrain.parallel.layout import DeviceMesh


def describe_torch_dist(place: Place) -> Description:
    """Describe a torch_dist checkpoint, or the latest of a folder of them.

    Raises CheckpointError.
    """
    folder = find_checkpoint(place.path)
    if folder is None:
        raise CheckpointError(f"no torch_dist checkpoint in {place.path}")
    found = read_metadata(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    lines = _lines(found)
    cut = [_num_chunks(entry) for entry in found.state_dict_metadata.values()]
    is_model = [line for line in lines if not line.name.startswith(("optimizer.", "chained_"))]
    facts: dict[str, Any] = {
        "iteration": folder.name if folder != place.path else None,
        "layout": _layout(place.path if folder == place.path else folder.parent),
        "pieces": f"up to {max(cut, default=0)} a tensor",
        "parameters": sum(math.prod(line.shape) for line in is_model),
        "optimizer tensors": len(lines) - len(is_model),
        "objects": sum(
            isinstance(entry, BytesStorageMetadata) for entry in found.state_dict_metadata.values()
        ),
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
    }
    return Description("Megatron checkpoint (torch_dist)", str(place.path), facts, lines)


def _layout(folder: Path) -> str | None:
    """Return the layout that an import here was cut for; None for anybody else's checkpoint."""
    for place in (folder, folder.parent):  # the folder of iterations, or of one of them
        path = place / FOLDER / CONVERSION
        if path.is_file():
            try:
                return DeviceMesh(**read_json(path)["layout"]).describe()
            except (KeyError, TypeError, LayoutError) as error:
                raise CheckpointError(f"cut short or altered: {path}: {error!r}") from error
    return None


def _num_chunks(entry: Any) -> int:
    return 0 if isinstance(entry, BytesStorageMetadata) else len(entry.chunks)


def _lines(found: Metadata) -> list[TensorLine]:
    files: defaultdict[str, set[str]] = defaultdict(set)
    for index, info in (found.storage_data or {}).items():
        files[index.fqn].add(str(info.relative_path))
    result = []
    for name, entry in found.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        dtype, where = entry.properties.dtype, sorted(files[name])
        shown = where[0] if len(where) == 1 else f"{len(where)} files"
        size = tuple(entry.size)
        bytes_of = math.prod(size) * dtype.itemsize
        result.append(TensorLine(name, str(dtype).removeprefix("torch."), size, bytes_of, shown))
    return result
