"""Which drivers of this user run on this host, so that `megatrain top` finds them.  No torch.

Each has a file with its URL in a folder that only the user can read and write.
"""

import contextlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunningDriver:
    """A driver that serves its metrics."""

    pid: int
    url: str


def announce(url: str, port: int) -> Path | None:
    """Note that this process serves at `url`; return the file, None if it cannot be written."""
    try:
        folder = _folder()
        if folder is None:
            return None
        path = folder / f"{os.getpid()}-{port}"
        path.write_text(url)
    except OSError as error:
        logger.debug("megatrain top will not find this driver by itself: %s", error)
        return None
    return path


def withdraw(path: Path | None) -> None:
    """Remove what announce wrote."""
    if path is not None:
        path.unlink(missing_ok=True)


def running_drivers() -> list[RunningDriver]:
    """Return the user's drivers on this host; files of processes that are gone are removed."""
    folder = _folder()
    found = []
    for path in sorted(folder.iterdir()) if folder is not None else []:
        pid = path.name.partition("-")[0]
        if not pid.isdigit() or not psutil.pid_exists(int(pid)):
            path.unlink(missing_ok=True)
            continue
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            found.append(RunningDriver(int(pid), path.read_text()))
    return found


def _folder() -> Path | None:
    """Return the user's folder; None if it is somebody else's, who could send us anywhere."""
    folder = Path(tempfile.gettempdir()) / f"megatrain-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    told = folder.lstat()
    if folder.is_symlink() or told.st_uid != os.getuid() or told.st_mode & 0o077:
        logger.debug("%s is not this user's alone", folder)
        return None
    return folder
