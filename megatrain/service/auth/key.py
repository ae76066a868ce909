"""API keys: made here, and kept as hashes alone."""

import hashlib
import re
import secrets
import time

from megatrain.errors import ConfigError
from megatrain.service.auth.principal import SCOPES
from megatrain.service.store.records import ApiKey

PREFIX = "tml-"
"""The Tinker client takes no other."""
_RANDOM_BYTES = 32
MAX_NAME = 200


def digest(key: str) -> str:
    """Return what is kept of a key.

    SHA-256 and no slow hash: a key has 256 random bits, which nobody can try out.
    """
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def new_key(
    project: str, name: str, scopes: tuple[str, ...], *, expires_in_s: float | None = None
) -> tuple[str, ApiKey]:
    """Return a new key and its record.

    Raises ConfigError for unknown scopes or none, and names that do not fit on a line.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@\-]{0,63}", project):
        raise ConfigError(
            "a project is named by up to 64 letters, digits, '_', '-', '.' and '@', and begins "
            f"with a letter, a digit or '_': {project[:80]!r}"
        )
    if len(name) > MAX_NAME or not name.isprintable():
        raise ConfigError(f"a name has up to {MAX_NAME} printable characters: {name[:80]!r}")
    if not scopes:
        raise ConfigError(f"a key needs at least one scope of {', '.join(SCOPES)}")
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise ConfigError(f"unknown scopes {unknown}; known: {', '.join(SCOPES)}")
    key = PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    now = time.time()
    record = ApiKey(
        project=project,
        name=name,
        hash=digest(key),
        prefix=key[:8],
        scopes=tuple(scopes),
        created=now,
        expires=None if expires_in_s is None else now + expires_in_s,
    )
    return key, record
