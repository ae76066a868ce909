"""Write a whole model as a Hugging Face checkpoint: shards, index, configuration, tokenizer."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatrain.checkpoint.safetensors_folder import INDEX, SafetensorsFolder
from megatrain.errors import ExportError
from megatrain.export.folder import replaced

CARRIED = (".json", ".txt", ".model", ".jinja")
"""Suffixes of files that are copied from the source: configuration, tokenizer, template."""


def write_checkpoint(
    directory: Path, batches: Iterable[dict[str, Tensor]], *, source: Path
) -> Path:
    """Write one shard per batch, read each back, and put the folder in its place when all is there.

    `source` is the checkpoint that was trained: its configuration and tokenizer are carried along,
    and exactly its tensors must be written.  Raises ExportError, and leaves no partial folder.
    """
    with replaced(directory, may_replace=is_checkpoint) as folder:
        shards, total = _write_shards(folder, batches)
        weight_map = {}
        for number, (path, keys) in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            path.rename(folder / name)
            weight_map.update(dict.fromkeys(keys, name))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
        for path in source.iterdir():
            if path.suffix in CARRIED and path.name != INDEX:
                shutil.copyfile(path, folder / path.name)
        _check_complete(folder, source)
    return directory


def is_checkpoint(directory: Path) -> bool:
    """Tell whether a folder is a checkpoint and nothing else, so that it may be replaced."""
    paths = list(directory.iterdir())
    suffixes = {*CARRIED, ".safetensors"}
    return (directory / "config.json").is_file() and all(p.suffix in suffixes for p in paths)


def _write_shards(
    folder: Path, batches: Iterable[dict[str, Tensor]]
) -> tuple[list[tuple[Path, list[str]]], int]:
    shards, total = [], 0
    for number, batch in enumerate(batches):
        path = folder / f"shard-{number}.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in batch.items()}
        save_file(tensors, path, metadata={"format": "pt"})
        written = load_file(path)
        changed = [n for n, t in tensors.items() if not torch.equal(written[n], t)]
        if changed:
            raise ExportError(f"tensors read back differ from what was written: {changed[:5]}")
        shards.append((path, list(tensors)))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    return shards, total


def _check_complete(folder: Path, source: Path) -> None:
    written, expected = SafetensorsFolder(folder).shapes(), SafetensorsFolder(source).shapes()
    if written != expected:
        wrong = sorted(
            k for k in written.keys() | expected.keys() if written.get(k) != expected.get(k)
        )
        raise ExportError(
            f"{len(wrong)} tensor(s) are missing, new or of another shape than in the checkpoint "
            f"that was trained: {', '.join(wrong[:5])}"
        )
