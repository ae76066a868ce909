"""Checkpoints that ranks were told to load, kept until no replay can want them again."""

import os
import shutil
import time
import uuid
from pathlib import Path

KEPT_S = 6 * 3600.0
"""A snapshot, which comes minutes after a load, ends the need of its files."""


class Loaded:
    """Folders of hard links: a checkpoint may be deleted while its load can still be repeated."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def link(self, name: str, checkpoint: Path) -> Path:
        """Return a folder with a checkpoint's files; the same again for the same name."""
        target = self._folder / name
        if target.exists():
            return target
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f".{uuid.uuid4().hex}"
        shutil.copytree(checkpoint, partial, copy_function=_link)
        partial.rename(target)
        return target

    def sweep(self) -> None:
        """Delete what was linked long ago."""
        if not self._folder.is_dir():
            return
        for each in self._folder.iterdir():
            if each.stat().st_mtime < time.time() - KEPT_S:
                shutil.rmtree(each, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
