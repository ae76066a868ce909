"""Put a folder of files in its place, whole or not at all.  Says nothing of what is in it."""

import contextlib
import ctypes
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from megatrain.errors import ExportError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def replaced(directory: Path, *, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a new folder to write into; on success it becomes `directory`, else it is removed.

    An existing `directory` is replaced in one step where the system can (Linux), if `may_replace`
    agrees, before and after.

    Raises:
        ExportError: `directory` exists and must not be replaced.
    """
    directory = Path(os.path.abspath(directory))
    check_may_replace(directory, may_replace)
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = directory.parent / f".{directory.name}.{uuid.uuid4().hex}.partial"
    new.mkdir()
    try:
        yield new
        for path in [*new.rglob("*"), new]:
            sync(path)
        check_may_replace(directory, may_replace)
        take_place(new, directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_may_replace(directory: Path, may_replace: Callable[[Path], bool]) -> None:
    """Raise ExportError if something is at `directory` that must not be replaced."""
    if os.path.lexists(directory) and not (
        directory.is_dir() and not directory.is_symlink() and may_replace(directory)
    ):
        raise ExportError(
            f"only a folder of the same kind, with nothing else in it, is replaced: {directory}",
            hint="export to another folder, or remove this one",
        )


def take_place(new: Path, directory: Path) -> None:
    """Rename `new`; the old folder, if any, is then at `new`."""
    if not directory.exists():
        new.rename(directory)
    elif not _exchange(new, directory):
        old = new.with_suffix(".old")
        directory.rename(old)
        try:
            new.rename(directory)
        except OSError:
            old.rename(directory)
            raise
        old.rename(new)


def _exchange(one: Path, other: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
