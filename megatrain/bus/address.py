"""Where ranks listen: `unix:/path` on this host, `tcp://HOST:PORT` with a token.  No torch."""

import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from megatrain.config.bus import BusConfig
from megatrain.errors import ConfigError

LOST_S = 10
"""Seconds without an answer after which a TCP connection counts as lost."""


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed address; `path` of a Unix socket, or `host` and `port`."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Return the address.  Raises ConfigError."""
        if path := text.startswith("unix:") and text.removeprefix("unix:").removeprefix("//"):
            return cls(path=path)
        host, _, port = text.removeprefix("tcp://").rpartition(":")
        if text.startswith("tcp://") and host and port.isdigit() and int(port) < 1 << 16:
            return cls(host=host.strip("[]"), port=int(port))
        raise ConfigError(
            f"an address must be tcp://HOST:PORT or unix:/path: {text!r}",
            hint="tcp://127.0.0.1:29400 is this host alone",
        )

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"

    def listen(self) -> socket.socket:
        """Return a listening socket.

        A Unix socket is for its owner alone; one that a dead process left is replaced.  Raises
        ConfigError for a path where something else is, or somebody listens.
        """
        if self.path:
            _make_way(Path(self.path))
            listener = socket.socket(socket.AF_UNIX)
            before = os.umask(0o177)
            try:
                listener.bind(self.path)
            finally:
                os.umask(before)
            listener.listen()
            return listener
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        return socket.create_server((self.host, self.port), family=family, backlog=16)

    def connect(self, config: BusConfig, timeout_s: float) -> socket.socket:
        """Return a connected socket, encrypted if there is a certificate.  Raises OSError."""
        if not self.path:
            connection = socket.create_connection((self.host, self.port), timeout=timeout_s)
            keep_alive(connection)
            return _encrypted(connection, config)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        try:
            connection.connect(self.path)
        except OSError:
            connection.close()
            raise
        return connection


def _make_way(path: Path) -> None:
    """Remove a socket on which nobody listens."""
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise ConfigError(
            f"there is something that is no socket: {path}", hint="choose another path"
        )
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ConfigError(f"somebody listens at {path} already", hint="end it, or choose another path")


def _encrypted(connection: socket.socket, config: BusConfig) -> socket.socket:
    if config.certificate is None:
        return connection
    try:
        context = ssl.create_default_context(cafile=str(config.certificate))
        context.check_hostname = False  # the one certificate that is accepted says who it is
        return context.wrap_socket(connection)
    except OSError:
        connection.close()
        raise


def keep_alive(connection: socket.socket) -> None:
    """Let a TCP connection send at once, and notice within seconds that its host is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}
    options["TCP_USER_TIMEOUT"] = 1000 * LOST_S
    for name, value in options.items():
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def server_context(config: BusConfig) -> ssl.SSLContext | None:
    """Return what encrypts a worker's connections; None without a certificate."""
    if config.certificate is None:
        return None
    if config.private_key is None:
        raise ConfigError("a worker with a certificate needs its private key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.certificate, config.private_key)
    except OSError as error:  # SSLError too
        raise ConfigError(
            f"the certificate {config.certificate} and the key {config.private_key} cannot be "
            f"used: {error}"
        ) from error
    return context
