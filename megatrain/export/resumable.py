"""A folder that is written file by file, over interruptions, and appears when all of it is there.

Until then it stands beside its place under a hidden name, with a journal of the files that are
whole.  A file is journalled after it has reached the disk, so what the journal names can be kept
after a SIGKILL or a power cut.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import xxhash
from filelock import FileLock, Timeout

from megatrain.errors import ExportError
from megatrain.export.folder import check_may_replace, sync, take_place

logger = logging.getLogger(__name__)

IDENTITY, JOURNAL, LOCK, PART = ".identity.json", ".journal", ".lock", ".part"


class ResumableFolder:
    """Files of `target`, each made once.

    Args:
        target: where the folder will be.  One that is there is replaced if `may_replace` agrees.
        identity: what decides the bytes, as JSON: sources and options.  A folder that was begun
            with another identity is refused, or thrown away with `restart`.
    """

    def __init__(
        self,
        target: Path,
        identity: Mapping[str, Any],
        *,
        may_replace: Callable[[Path], bool],
        restart: bool = False,
    ) -> None:
        self.target = Path(os.path.abspath(target))
        self.folder = self.target.parent / f".{self.target.name}.converting"
        self._identity, self._restart = json.loads(json.dumps(identity)), restart
        self._may_replace = may_replace
        self._lock = FileLock(self.target.parent / f".{self.target.name}{LOCK}", timeout=0)

    def __enter__(self) -> Self:
        """Begin, or go on.  Raises ExportError if that is not possible; nothing has changed."""
        check_may_replace(self.target, self._may_replace)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ExportError(
                f"another process is writing {self.target}", hint="wait for it, or stop it"
            ) from error
        try:
            self._begin()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Leave what is whole for the next time."""
        self._release()

    def _release(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._lock.lock_file)
        self._lock.release()

    def _begin(self) -> None:
        if self.folder.exists() and self._restart:
            shutil.rmtree(self.folder)
        identity = self.folder / IDENTITY
        if identity.is_file():
            found = json.loads(identity.read_text())
            if found != self._identity:
                other = sorted(
                    key
                    for key in found.keys() | self._identity.keys()
                    if found.get(key) != self._identity.get(key)
                )
                raise ExportError(
                    f"{self.folder} was begun from something else: {', '.join(other)} differ",
                    hint="--restart throws it away and begins anew",
                )
            logger.info("going on with %s", self.folder)
            self._remove_parts()
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        try:
            identity.write_text(json.dumps(self._identity, indent=1))
            sync(identity)
            sync(self.folder)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _remove_parts(self) -> None:
        """Remove what processes that were killed had half written."""
        for path in self.folder.rglob(f"*{PART}"):
            path.unlink(missing_ok=True)

    def finish(self, names: Iterable[str]) -> None:
        """Put the folder in its place; nothing of the journals is left in it.

        `names` are the files that must be there.  Raises ExportError if one is not.
        """
        lacking = sorted(name for name in names if not (self.folder / name).is_file())
        if lacking:
            raise ExportError(f"not all files were written: {', '.join(lacking[:5])}")
        for path in [*self.folder.glob(f"{JOURNAL}*"), self.folder / IDENTITY]:
            path.unlink()
        self._remove_parts()
        for path in [*self.folder.rglob("*"), self.folder]:
            sync(path)
        check_may_replace(self.target, self._may_replace)
        take_place(self.folder, self.target)
        sync(self.target.parent)
        shutil.rmtree(self.folder, ignore_errors=True)


class Journal:
    """One process's list of the files in a folder that are whole, with a few words on each.

    `trusted`: contents were compared with the journals when this run began, and need not be again.
    """

    def __init__(self, folder: Path, worker: int = 0, *, trusted: bool = False) -> None:
        self.folder = folder
        self._path = folder / f"{JOURNAL}.{worker}"
        self.done = _read_all(folder, trusted=trusted)
        """By file name: what `write` got from whoever wrote the file."""

    def write(self, name: str, make: Callable[[Path], tuple[str, Mapping[str, Any]]]) -> None:
        """Make one file, unless it is there: `make(path)` returns its XXH3-64 and some JSON.

        Raises ExportError if the disk is full; what is whole stays, and nothing else.
        """
        if name in self.done:
            return
        # By a name of this process's own: one that outlives its run must not write into the next.
        path = self.folder / f"{name}.{os.getpid()}{PART}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with explained(self.folder):
            try:
                digest, words = make(path)
                sync(path)
                path.rename(self.folder / name)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            sync(path.parent)
            entry = {"size": (self.folder / name).stat().st_size, "xxh3": digest, **words}
            self._append({"name": name, **entry})
        self.done[name] = entry

    def _append(self, entry: Mapping[str, Any]) -> None:
        """Add a line, and end one that was torn when the disk was full or the process killed."""
        with self._path.open("ab+") as file:
            torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _read_all(folder: Path, *, trusted: bool) -> dict[str, dict[str, Any]]:
    """Return the files that some journal names and that are as it says."""
    found: dict[str, dict[str, Any]] = {}
    for journal in sorted(folder.glob(f"{JOURNAL}*")):
        for line in journal.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # torn: the disk was full, or the process was killed
            name = entry.pop("name")
            path = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                continue  # nothing outside is written here, so somebody else wrote this line
            if path.is_file() and path.stat().st_size == entry["size"]:
                if trusted or checksum(path) == entry["xxh3"]:
                    found[str(path.relative_to(folder))] = entry
                else:
                    logger.warning("written again, since it was altered: %s", path)
    return found


def checksum(path: Path) -> str:
    """Return a file's XXH3-64 in hexadecimal."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_space(folder: Path, needed: int) -> None:
    """Raise ExportError if the disk that holds `folder` has fewer bytes left than needed."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"the disk is too full for the result: {needed / 1e6:,.1f} MB needed, "
            f"{free / 1e6:,.1f} MB free at {folder}",
            hint="free some space, or write to another disk",
        )


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say what a full disk means for the work that was begun."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ExportError(
            f"the disk is full: {error.filename or folder}",
            hint="free some space and run the same command again: it goes on where it stopped",
        ) from error
