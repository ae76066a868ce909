"""Folders behind a URL such as s3://bucket/path: copied here to be read, copied there when whole.

Any file system that fsspec knows; its own package (s3fs, gcsfs, ...) must be installed.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from megatrain.checkpoint.locate import ALL_FILES, PICKLED_FILES, locate
from megatrain.errors import CheckpointError

HUBS = ("hf", "ms")


def is_remote(place: str) -> bool:
    """Tell whether a place is a URL of a file system other than this machine's and the hubs."""
    scheme, separator, _ = place.partition("://")
    return bool(separator) and scheme not in HUBS


@contextlib.contextmanager
def local_source(
    place: str, *, is_checkpoint: bool = True, allow_pickle: bool = False
) -> Iterator[Path]:
    """Give a local folder with what is at `place`: a path, a hub's id, or a URL.

    is_checkpoint=False takes any local folder as it is; allow_pickle=True asks a hub that has no
    safetensors for pickled weights.  Raises CheckpointError if there is nothing.  A copy of a URL's
    files is removed afterwards.
    """
    if not is_remote(place):
        path = Path(place).expanduser()
        if is_checkpoint or not path.exists():
            path = locate(place, ALL_FILES)
            if allow_pickle and not any(path.glob("*.safetensors")):
                path = locate(place, PICKLED_FILES)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="megatrain-source-") as name:
        system, path_there = _open(place)
        try:
            if not system.isdir(path_there):
                raise CheckpointError(f"no folder at {place}")
            system.get(path_there.rstrip("/") + "/", name, recursive=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {place}: {error}") from error
        yield Path(name)


@contextlib.contextmanager
def local_target(place: str) -> Iterator[Path]:
    """Give a local path to write a new folder at; if it is there afterwards, it goes to `place`."""
    if not is_remote(place):
        if place.partition("://")[0] in HUBS and "://" in place:
            raise CheckpointError(
                f"a result is not written to a hub: {place}",
                hint="write to a folder, and push that",
            )
        yield Path(place).expanduser()
        return
    system, path_there = _open(place)
    if system.exists(path_there):
        raise CheckpointError(f"there is something at {place} already", hint="choose a new place")
    with tempfile.TemporaryDirectory(prefix="megatrain-target-") as name:
        target = Path(name) / "folder"
        yield target
        if target.is_dir():
            _put(system, target, path_there.rstrip("/"), place)


def _put(system: Any, folder: Path, path_there: str, place: str) -> None:
    """Copy a folder there, all of it or nothing.  Raises CheckpointError."""
    try:
        system.put(f"{folder}/", f"{path_there}/", recursive=True)
    except BaseException as error:
        left = "nothing is left there"
        try:
            if system.exists(path_there):
                system.rm(path_there, recursive=True)
        except Exception as second:  # noqa: BLE001 - said with the first one, which is raised
            left = f"what is there is not whole and could not be removed ({second}): remove it"
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"the result could not be copied to {place}: {type(error).__name__}: {error}",
            hint=f"{left}; run the command again, or convert to a local folder and copy that",
        ) from error


def _open(place: str) -> tuple[Any, str]:
    try:
        system, path = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise CheckpointError(
            f"cannot reach {place}: {error}", hint="install the fsspec package of this scheme"
        ) from error
    return system, path
