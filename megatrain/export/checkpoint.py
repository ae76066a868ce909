"""Write a whole model as a Hugging Face checkpoint: shards, index, configuration, tokenizer."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from megatrain.checkpoint.safetensors_folder import INDEX, SafetensorsFolder
from megatrain.errors import ExportError
from megatrain.export.folder import replaced
from megatrain.export.shards import write_shards
from megatrain.export.state.folder import is_state_folder

CARRIED = (".json", ".txt", ".model", ".jinja")
"""Suffixes of files that are copied from the source: configuration, tokenizer, template."""


def write_checkpoint(
    directory: Path,
    batches: Iterable[dict[str, Tensor]],
    *,
    source: Path,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write one shard per batch, read each back, and put the folder in its place when all is there.

    `source` is the checkpoint that was trained: its configuration and tokenizer are carried along,
    and exactly its tensors must be written; `also` writes more into the folder.  Raises
    ExportError, and leaves no partial folder.
    """
    with replaced(directory, may_replace=is_checkpoint) as folder:
        write_shards(folder, batches)
        for path in source.iterdir():
            if path.suffix in CARRIED and path.name != INDEX:
                shutil.copyfile(path, folder / path.name)
        _check_complete(folder, source)
        if also is not None:
            also(folder)
    return directory


def is_checkpoint(directory: Path) -> bool:
    """Tell whether a folder is a checkpoint, maybe with a state, so that it may be replaced."""
    paths = [path for path in directory.iterdir() if not is_state_folder(path)]
    suffixes = {*CARRIED, ".safetensors"}
    return (directory / "config.json").is_file() and all(p.suffix in suffixes for p in paths)


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
