"""Folders of files by key: put whole or not at all, and taken out verified.

A folder's manifest, with sizes and SHA-256, is written last: without one there is nothing.
"""

import asyncio
import hashlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from pathlib import Path, PurePosixPath
from typing import Any, Self

import fsspec

from megatrain.errors import CheckpointError, ConfigError, DataError

MANIFEST = ".manifest.json"
PARTIAL = ".partial"
"""Folder of what is on its way in: no key begins with a dot."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_CHUNK = 1 << 22
COPY_S = 3600.0
"""A local copy of files that are kept elsewhere is deleted when it was not used for so long."""


class Files:
    """Where checkpoints are kept."""

    def __init__(self, system: Any, root: str, scratch: Path) -> None:
        """`system` is fsspec's; `scratch` a local folder for what is on its way."""
        self._system, self._root, self.scratch = system, root.rstrip("/"), scratch
        self._is_local = "file" in _protocols(system)
        self._lock = threading.Lock()
        """Held while a folder takes another's place, so that nobody sees neither."""
        self._fetching: dict[str, threading.Lock] = {}

    @classmethod
    async def open(cls, url: str, folder: Path) -> Self:
        """Open a folder or a URL of fsspec.  Raises ConfigError where it cannot be written."""
        scratch = folder / "scratch"
        scratch.mkdir(parents=True, mode=0o700, exist_ok=True)
        for left in scratch.iterdir():
            # Ranks that start anew may load again what was fetched before this process.
            if not left.name.startswith("fetched-") or left.name.endswith(".new"):
                await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)
        try:
            system, root = fsspec.core.url_to_fs(url)
            await asyncio.to_thread(system.makedirs, root, exist_ok=True)
            if "file" in _protocols(system):  # a process that was killed may have left some
                await asyncio.to_thread(shutil.rmtree, f"{root}/{PARTIAL}", ignore_errors=True)
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
            if file.is_file() and not file.is_symlink() and file.name != MANIFEST
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
        partial = Path(self._root) / PARTIAL / uuid.uuid4().hex
        partial.parent.mkdir(exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, partial)
        _sync(partial)
        with self._lock:
            _recover(target)
            if target.exists():
                target.rename(_old(target))
            partial.rename(target)
            _sync_one(target.parent)
        shutil.rmtree(_old(target), ignore_errors=True)

    async def manifest(self, key: str) -> dict[str, dict[str, Any]]:
        """Return sizes and checksums of a key's files.  Raises CheckpointError if not whole."""
        path = self._path(key)
        try:
            data = await asyncio.to_thread(self._read_manifest, path)
            return _checked(json.loads(data))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the files of {key} are not there, or not whole") from error

    def _read_manifest(self, path: str) -> bytes:
        if self._is_local and _old(Path(path)).exists():
            with self._lock:
                _recover(Path(path))
        data: bytes = self._system.cat_file(f"{path}/{MANIFEST}")
        return data

    async def local_folder(self, key: str) -> Path:
        """Return a local folder with a key's files, verified: the real one, or a copy.

        Raises CheckpointError if they are not as they were put.
        """
        manifest = await self.manifest(key)
        return await asyncio.to_thread(self._local, self._path(key), key, manifest)

    def _local(self, path: str, key: str, manifest: dict[str, dict[str, Any]]) -> Path:
        if self._is_local:
            _verify(Path(path), key, manifest)
            return Path(path)
        self._delete_old_copies()
        # Named by what is in it: the same files are copied once, others under the same key anew.
        text = json.dumps([key, manifest], sort_keys=True)
        folder = self.scratch / f"fetched-{hashlib.sha256(text.encode()).hexdigest()}"
        with self._fetching.setdefault(folder.name, threading.Lock()):
            if folder.is_dir():
                os.utime(folder)
                _verify(folder, key, manifest)
            else:
                self._fetch(path, key, manifest, folder)
        self._fetching.pop(folder.name, None)
        return folder

    def _fetch(
        self, path: str, key: str, manifest: dict[str, dict[str, Any]], folder: Path
    ) -> None:
        partial = folder.with_name(f"{folder.name}.new")
        try:
            for name in manifest:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                self._system.get_file(f"{path}/{name}", str(partial / name))
            _verify(partial, key, manifest)
            partial.rename(folder)
        except FileNotFoundError as error:
            raise CheckpointError(f"the files of {key} are not there, or not whole") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _delete_old_copies(self) -> None:
        for folder in self.scratch.glob("fetched-*"):
            try:
                is_old = folder.stat().st_mtime < time.time() - COPY_S
            except FileNotFoundError:
                continue
            if is_old:
                shutil.rmtree(folder, ignore_errors=True)

    async def delete(self, key: str) -> None:
        """Delete a key's files; nothing happens if there are none."""
        await asyncio.to_thread(self._remove, self._path(key))

    def _remove(self, path: str) -> None:
        if self._is_local:
            shutil.rmtree(_old(Path(path)), ignore_errors=True)
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


def _old(target: Path) -> Path:
    """Return where a folder waits while another takes its place."""
    return target.with_name(f".{target.name}.old")


def _recover(target: Path) -> None:
    """Finish what a process that was killed has left: the folder before, unless there is a new."""
    old = _old(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def _sync(folder: Path) -> None:
    """Let what is in a folder survive a loss of power."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checked(manifest: Any) -> dict[str, dict[str, Any]]:
    """Return a manifest that names files below its folder only.  Raises ValueError."""
    if not isinstance(manifest, dict):
        raise ValueError("not a manifest")
    for name, each in manifest.items():
        parts = PurePosixPath(name).parts
        is_inside = bool(parts) and not name.startswith("/") and ".." not in parts
        if not is_inside or "\\" in name or "\0" in name or name == MANIFEST:
            raise ValueError(f"not a name of a file in a folder: {name!r}")
        if not isinstance(each["size"], int) or not isinstance(each["sha256"], str):
            raise ValueError(f"no size or checksum of {name!r}")
    return manifest


def _verify(folder: Path, key: str, manifest: dict[str, dict[str, Any]]) -> None:
    """Raise CheckpointError unless a folder holds what its manifest says."""
    for name, each in manifest.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != each["size"]:
            raise CheckpointError(f"{name} of {key} is missing or cut short")
        if _sha256(file) != each["sha256"]:
            raise CheckpointError(f"{name} of {key} was altered")


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
