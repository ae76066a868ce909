"""Tensors as a folder of safetensors files with an index, each file read back and compared."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatrain.checkpoint.safetensors_folder import INDEX
from megatrain.errors import ExportError


def write_shards(folder: Path, batches: Iterable[dict[str, Tensor]]) -> None:
    """Write one file per batch, named and indexed as Transformers does, into an existing folder.

    Raises ExportError if a file does not hold what was written.
    """
    shards, total = [], 0
    for number, batch in enumerate(batches):
        path = folder / f"shard-{number}.safetensors"
        total += _write(path, batch)
        shards.append((path, list(batch)))
    weight_map = {}
    for number, (path, keys) in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / name)
        weight_map.update(dict.fromkeys(keys, name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def _write(path: Path, batch: dict[str, Tensor]) -> int:
    """Write one file, compare it with the tensors, return their bytes."""
    tensors = {name: tensor.contiguous() for name, tensor in batch.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    written = load_file(path)
    changed = [n for n, t in tensors.items() if not _same_bits(written[n], t)]
    if changed:
        raise ExportError(f"tensors read back differ from what was written: {changed[:5]}")
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare as bytes, so that a NaN in an optimizer's state is no difference."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )
