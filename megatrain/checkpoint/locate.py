"""Where a checkpoint is: a local folder, or a hub's id, which is then downloaded."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from megatrain.errors import CheckpointError

TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
ALL_FILES = ("*.safetensors", *TOKENIZER_FILES)
"""Files of a model repository that are wanted; never pickled weights."""
PICKLED_FILES = ("pytorch_model*.bin", *ALL_FILES)
"""The same, for whoever allows them."""


def locate(model_id: str, files: Sequence[str] = ALL_FILES) -> Path:
    """Return the local folder of `model_id`: a path, `hf://id`, `ms://id` or a plain hub id.

    A path that exists wins; from a hub come `files`, patterns of names.  Raises CheckpointError
    when nothing is found.
    """
    scheme, _, rest = model_id.rpartition("://")
    if scheme not in ("", "hf", "ms"):
        raise CheckpointError(f"unknown scheme {scheme!r} in {model_id!r}; known: hf, ms")
    path = Path(rest).expanduser()
    if not scheme and (path / "config.json").is_file():
        return path
    if not scheme and (path.exists() or rest.startswith((".", "/", "~"))):
        raise CheckpointError(f"not a checkpoint folder, it has no config.json: {rest}")
    return _download(scheme or "hf", rest, files)


def _download(scheme: str, repository: str, files: Sequence[str]) -> Path:
    package = "huggingface_hub" if scheme == "hf" else "modelscope"
    try:
        hub = importlib.import_module(package)
    except ImportError as error:
        raise CheckpointError(
            f"{scheme}:// needs the package {package}", hint=f"pip install {package}"
        ) from error
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=list(files)))
    except Exception as error:
        raise CheckpointError(
            f"cannot download {repository!r} from {package}: {type(error).__name__}: {error}",
            hint="give a local folder with config.json and *.safetensors, or check the id",
        ) from error
