"""Write a whole model as a Hugging Face checkpoint: shards, index, configuration, tokenizer."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from megatrain.checkpoint.safetensors_folder import INDEX, SafetensorsFolder
from megatrain.errors import ExportError
from megatrain.export.folder import replaced
from megatrain.export.shards import write_shards
from megatrain.export.skeleton import Skeleton
from megatrain.export.state.folder import is_state_folder
from megatrain.model.score import SCORE

CARRIED = (".json", ".txt", ".model", ".jinja")
"""Suffixes of files that are copied from the source: configuration, tokenizer, template."""
type Shapes = dict[str, tuple[int, ...]]

OUTPUT_LAYER = "lm_head."
"""What a model for sequence classification has not, in the names of a causal one's tensors."""


def write_checkpoint(
    directory: Path,
    batches: Iterable[dict[str, Tensor]],
    *,
    source: Path,
    has_score: bool = False,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write one shard per batch, read each back, and put the folder in its place when all is there.

    `source` is the checkpoint that was trained: its configuration and tokenizer are carried along,
    and exactly its tensors must be written, or with `has_score` those of Transformers' model for
    sequence classification.  `also` writes more into the folder.  Raises ExportError, and leaves
    no partial folder.
    """
    with replaced(directory, may_replace=is_checkpoint) as folder:
        write_shards(folder, batches)
        for path in source.iterdir():
            if path.suffix in CARRIED and path.name != INDEX:
                shutil.copyfile(path, folder / path.name)
        expected = SafetensorsFolder(source).shapes()
        if has_score:
            expected = _with_score(expected, folder / "config.json")
        _check_complete(folder, expected)
        if also is not None:
            also(folder)
    return directory


def is_checkpoint(directory: Path) -> bool:
    """Tell whether a folder is a checkpoint, maybe with a state, so that it may be replaced."""
    paths = [path for path in directory.iterdir() if not is_state_folder(path)]
    suffixes = {*CARRIED, ".safetensors"}
    return (directory / "config.json").is_file() and all(p.suffix in suffixes for p in paths)


def _with_score(shapes: Shapes, config_file: Path) -> Shapes:
    """Make a configuration one of a model with a score head, and return its tensors' shapes."""
    config = json.loads(config_file.read_text())
    model = Skeleton(config, has_score=True).model
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config |= labels | {"architectures": [type(model).__name__]}
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    kept = {name: shape for name, shape in shapes.items() if not name.startswith(OUTPUT_LAYER)}
    return kept | {SCORE: tuple(model.get_parameter(SCORE).shape)}


def _check_complete(folder: Path, expected: Shapes) -> None:
    written = SafetensorsFolder(folder).shapes()
    if written != expected:
        wrong = sorted(
            k for k in written.keys() | expected.keys() if written.get(k) != expected.get(k)
        )
        raise ExportError(
            f"{len(wrong)} tensor(s) are missing, new or of another shape than in the checkpoint "
            f"that was trained: {', '.join(wrong[:5])}"
        )
