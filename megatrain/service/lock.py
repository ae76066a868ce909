"""One service for a folder: two would take each other's files and sessions for leftovers."""

import fcntl
from pathlib import Path
from typing import TextIO

from megatrain.errors import StateError


def lock(folder: Path) -> TextIO:
    """Return an open file that has a folder locked until it is closed, or its process is gone.

    Raises StateError while another service has it.
    """
    file = (folder / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StateError(
            f"another service uses {folder}", hint="end it, or give this one another --data"
        ) from None
    return file
