"""The page's files, shipped with the package: fixed names, read once."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from megatrain.errors import NotFoundError

PAGE = "index.html"
_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, and how it is told."""

    data: bytes
    media_type: str
    etag: str


@cache
def assets() -> dict[str, Asset]:
    """Return all files by name."""
    folder = files("megatrain.service.console").joinpath("assets")
    found = {}
    for each in folder.iterdir():
        media_type = _TYPES.get(each.name.rpartition(".")[2])
        if media_type is not None:
            data = each.read_bytes()
            found[each.name] = Asset(data, media_type, etag_of(data))
    return found


def asset(name: str) -> Asset:
    """Return a file.  Raises NotFoundError: names are looked up, never joined to a path."""
    if (found := assets().get(name)) is None:
        raise NotFoundError(f"the page has no file {name!r}")
    return found


def etag_of(data: bytes) -> str:
    """Return the tag by which a browser asks whether an answer is still the same."""
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'
