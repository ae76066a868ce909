"""What a rank does for test_convert_command: run a command as a user's process would."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import megatrain


def command(*arguments: str) -> tuple[int, str, str]:
    """Return exit status, output and error output of `megatrain ARGUMENTS`."""
    from megatrain.cli import main

    megatrain.shutdown()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


def through_memory(folder: Path, commands: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Put a checkpoint into fsspec's memory file system, run commands, return what is there."""
    import fsspec
    from safetensors.torch import load

    files = fsspec.filesystem("memory")
    files.put(f"{folder}/", "/source/", recursive=True)
    said = [command(*each) for each in commands]
    tensors: dict[str, torch.Tensor] = {}
    for path in files.glob("/back/*.safetensors"):
        tensors |= load(files.cat(path))
    left = sorted(str(path) for path in Path("/tmp").glob("megatrain-source-*"))
    return {"said": said, "tensors": tensors, "left": left}


def with_hub(folder: Path, commands: Sequence[Sequence[str]]) -> tuple[list[Any], list[Any]]:
    """Run commands where a hub has `folder` for every id; return what they and it were told."""
    from unittest import mock

    import huggingface_hub

    asked: list[Any] = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(folder)

    with mock.patch.object(huggingface_hub, "snapshot_download", snapshot_download):
        return [command(*each) for each in commands], asked
