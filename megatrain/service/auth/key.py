"""API keys: made here, and kept as hashes alone."""

import hashlib
import secrets
import time

from megatrain.errors import ConfigError
from megatrain.service.auth.principal import SCOPES
from megatrain.service.store.records import ApiKey

PREFIX = "tml-"
"""The Tinker client takes no other."""
_RANDOM_BYTES = 32


def digest(key: str) -> str:
    """Return what is kept of a key.

    SHA-256 and no slow hash: a key has 256 random bits, which nobody can try out.
    """
    return hashlib.sha256(key.encode()).hexdigest()


def new_key(
    project: str, name: str, scopes: tuple[str, ...], *, expires_in_s: float | None = None
) -> tuple[str, ApiKey]:
    """Return a new key and its record.  Raises ConfigError for unknown scopes."""
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
