"""A checkpoint's files as one tar, made while it is sent: nothing is written, the size is known."""

import tarfile
from collections.abc import AsyncIterator, Mapping
from typing import Any

from megatrain.service.files.files import Files

ARCHIVE = "*.tar"
"""What a ticket says instead of a file's name: no file is called so, hence no ticket is both."""
_BLOCK = tarfile.BLOCKSIZE

Manifest = Mapping[str, Mapping[str, Any]]


def size_of(manifest: Manifest) -> int:
    """Return the size of a tar of these files, in bytes."""
    each = (
        len(_header(name, file["size"])) + file["size"] + _padding(file["size"])
        for name, file in manifest.items()
    )
    return sum(each) + 2 * _BLOCK


async def pieces_of(files: Files, key: str, manifest: Manifest) -> AsyncIterator[bytes]:
    """Return a tar of a key's files, piece by piece."""
    for name, file in manifest.items():
        yield _header(name, file["size"])
        place = 0
        while place < file["size"]:
            piece = await files.read(key, name, place)
            if not piece:
                return  # cut short while it was read: the client sees less than was promised
            place += len(piece)
            yield piece
        yield bytes(_padding(file["size"]))
    yield bytes(2 * _BLOCK)


def _header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> int:
    return -size % _BLOCK
