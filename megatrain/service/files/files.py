"""Folders of files by key: put whole or not at all, and taken out verified.

A folder's manifest, with sizes and SHA-256, is written last: without one there is nothing.
"""

import asyncio
import hashlib
import json
import re
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any, Self

import fsspec

from megatrain.errors import CheckpointError, ConfigError, DataError

MANIFEST = ".manifest.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_CHUNK = 1 << 22


class Files:
    """Where checkpoints are kept."""

    def __init__(self, system: Any, root: str, scratch: Path) -> None:
        """`system` is fsspec's; `scratch` a local folder for what is on its way."""
        self._system, self._root, self.scratch = system, root.rstrip("/"), scratch
        self._is_local = "file" in _protocols(system)

    @classmethod
    async def open(cls, url: str, folder: Path) -> Self:
        """Open a folder or a URL of fsspec.  Raises ConfigError where it cannot be written."""
        scratch = folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True, mode=0o700)
        try:
            system, root = fsspec.core.url_to_fs(url)
            await asyncio.to_thread(system.makedirs, root, exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            raise ConfigError(f"files cannot be kept at {url}: {error}") from error
        return cls(system, root, scratch)

    def check_name(self, name: str) -> None:
        """Raise DataError unless a checkpoint may be called so."""
        if not _NAME.fullmatch(name) or ".." in name:
            raise DataError(
                f"a name must be up to 200 letters, digits, '_', '-' and '.', and begin with none "
                f"of the last two: {name[:220]!r}"
            )

    def _path(self, key: str) -> str:
        for part in key.split("/"):
            self.check_name(part)
        return f"{self._root}/{key}"

    async def put_folder(self, key: str, folder: Path) -> int:
        """Keep a local folder's files under a key, in place of what was there; return their size.

        The folder may be moved away.
        """
        path = self._path(key)
        return await asyncio.to_thread(self._put, path, folder)

    def _put(self, path: str, folder: Path) -> int:
        manifest: dict[str, dict[str, Any]] = {
            str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        text = json.dumps(manifest, indent=1)
        if self._is_local:
            (folder / MANIFEST).write_text(text)
            self._replace(folder, Path(path))
        else:
            self._remove(path)
            for name in manifest:
                self._system.put_file(str(folder / name), f"{path}/{name}")
            self._system.pipe_file(f"{path}/{MANIFEST}", text.encode())
        return sum(int(each["size"]) for each in manifest.values())

    def _replace(self, folder: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        shutil.move(folder, partial)
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    async def manifest(self, key: str) -> dict[str, dict[str, Any]]:
        """Return sizes and checksums of a key's files.  Raises CheckpointError if not whole."""
        path = self._path(key)
        try:
            data = await asyncio.to_thread(self._system.cat_file, f"{path}/{MANIFEST}")
            found: dict[str, dict[str, Any]] = json.loads(data)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the files of {key} are not there, or not whole") from error
        return found

    async def local_folder(self, key: str) -> Path:
        """Return a local folder with a key's files, verified: the real one, or a copy.

        Raises CheckpointError if they are not as they were put.
        """
        manifest = await self.manifest(key)
        return await asyncio.to_thread(self._local, self._path(key), key, manifest)

    def _local(self, path: str, key: str, manifest: dict[str, dict[str, Any]]) -> Path:
        folder = Path(path)
        if not self._is_local:
            folder = Path(tempfile.mkdtemp(dir=self.scratch))
            for name in manifest:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self._system.get_file(f"{path}/{name}", str(folder / name))
        for name, each in manifest.items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != each["size"]:
                raise CheckpointError(f"{name} of {key} is missing or cut short")
            if _sha256(file) != each["sha256"]:
                raise CheckpointError(f"{name} of {key} was altered")
        return folder

    async def delete(self, key: str) -> None:
        """Delete a key's files; nothing happens if there are none."""
        await asyncio.to_thread(self._remove, self._path(key))

    def _remove(self, path: str) -> None:
        if not self._system.exists(path):
            return
        if self._system.exists(f"{path}/{MANIFEST}"):
            self._system.rm_file(f"{path}/{MANIFEST}")
        self._system.rm(path, recursive=True)

    async def read(self, key: str, name: str, start: int) -> bytes:
        """Return a piece of a file, from a byte on; empty at its end.  Raises CheckpointError."""
        if name not in await self.manifest(key):
            raise CheckpointError(f"{key} has no file {name!r}")
        path = f"{self._path(key)}/{name}"
        return await asyncio.to_thread(self._system.cat_file, path, start=start, end=start + _CHUNK)


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
