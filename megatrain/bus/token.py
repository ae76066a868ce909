"""The secret that both ends of a TCP connection share.  No torch."""

import logging
import os
import secrets
import tempfile
from pathlib import Path

from megatrain.bus.address import Address
from megatrain.config.bus import BusConfig
from megatrain.errors import ConfigError

logger = logging.getLogger(__name__)

SHORTEST = 16
"""Bytes that a secret must have."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def default_file() -> Path:
    """Return where the secret of this user is, unless a file is named."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "megatrain" / "token"


def listening_token(address: Address, config: BusConfig) -> bytes:
    """Return the secret that drivers must have; empty for a Unix socket, which is its owner's.

    Without a file that is named, this user's is used, and made if it is not there.  Raises
    ConfigError.
    """
    if address.path:
        return b""
    if address.host not in LOOPBACK and config.certificate is None:
        logger.warning(
            "%s is not encrypted: give a certificate on a network that others use", address
        )
    if config.token_file is None and not default_file().exists():
        _make(default_file())
    return read_token(config.token_file or default_file())


def driving_token(address: Address, config: BusConfig) -> bytes:
    """Return the secret that ranks must have; empty for a Unix socket.  Raises ConfigError."""
    if address.path:
        return b""
    if config.token_file is None and not default_file().exists():
        raise ConfigError(
            f"{address} wants a token, and there is none: {default_file()} does not exist",
            hint="copy the file of that name from the host where the ranks are, or give token_file",
        )
    return read_token(config.token_file or default_file())


def _make(path: Path) -> None:
    """Make a token file that is whole from its first moment, unless somebody is faster."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".token-") as file:  # mode 600
        file.write(secrets.token_hex(32) + "\n")
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(file.name, path)
        except FileExistsError:
            return
    logger.info("made a token: %s", path)


def read_token(path: Path) -> bytes:
    """Return the secret in a file.  Raises ConfigError for one that cannot be read or is short."""
    try:
        token = path.read_bytes().strip()
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"the token file cannot be read: {error}") from error
    if len(token) < SHORTEST:
        raise ConfigError(
            f"a token must have at least {SHORTEST} bytes: {path} has {len(token)}",
            hint="`openssl rand -hex 32` makes one",
        )
    if mode & 0o077:
        logger.warning("%s can be read by others: chmod 600 it", path)
    return token
