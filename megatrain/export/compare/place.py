"""What a local path is: told from its files' names and the keys of its JSON, never by guessing."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatrain.errors import CheckpointError

Kind = Literal["hugging face", "adapter", "state", "torch_dist", "dataset"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
STATE = Path("state") / "state.json"
METADATA = ".metadata"
"""As in checkpoint/torch_dist_metadata.py, which needs torch."""
LATEST = "latest_checkpointed_iteration.txt"
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")

LOOKED_FOR = (
    "config.json with *.safetensors (Hugging Face)",
    f"{ADAPTER_CONFIG} (PEFT)",
    f"{STATE} (a training state of megatrain)",
    f"{METADATA} or {LATEST} (Megatron, torch_dist)",
    f"a data file ({', '.join(DATA_SUFFIXES)})",
)


@dataclass(frozen=True, slots=True)
class Place:
    """A path, and what is there."""

    kind: Kind
    path: Path


def recognise(path: Path) -> Place:
    """Say what a path is.  Raises CheckpointError, with all that was looked for, if nothing is.

    A checkpoint folder with a training state in it counts as the state: that holds all of it.
    """
    if path.is_file():
        if path.suffix in DATA_SUFFIXES:
            return Place("dataset", path)
        raise _unknown(path, [path.name])
    if not path.is_dir():
        raise CheckpointError(f"there is nothing at {path}", hint=f"known: {'; '.join(LOOKED_FOR)}")
    names = sorted(each.name for each in path.iterdir())
    if (path / STATE).is_file():
        return Place("state", path)
    if ADAPTER_CONFIG in names:
        return Place("adapter", path)
    if METADATA in names or LATEST in names:
        return Place("torch_dist", path)
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return Place("hugging face", path)
    if "config.json" not in names and any(name.endswith(DATA_SUFFIXES) for name in names):
        return Place("dataset", path)
    raise _unknown(path, names)


def _unknown(path: Path, names: Sequence[str]) -> CheckpointError:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    hint = f"looked for: {'; '.join(LOOKED_FOR)}"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        hint = (
            "pickled weights are not read; `megatrain convert import --allow-pickle`, then "
            "`megatrain convert export` make safetensors of pytorch_model*.bin"
        )
    return CheckpointError(f"nothing known at {path}; it holds {shown or 'nothing'}", hint=hint)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.  Raises CheckpointError."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"not a JSON object: {path}")
    return content
