"""Where something to be looked at is: any local path as it is, else a hub's id or a URL."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def local_place(place: str) -> Iterator[Path]:
    """Give a local path.  Raises CheckpointError if a hub or a URL has nothing of that name.

    A local path that does not exist is given too: whoever looks at it says what is missing.
    """
    from megatrain.checkpoint.remote import is_remote, local_source

    path = Path(place.removeprefix("file://")).expanduser()
    if path.exists() or (not is_remote(place) and place.startswith((".", "/", "~"))):
        yield path
        return
    with local_source(place, is_checkpoint=not is_remote(place)) as folder:
        yield folder
