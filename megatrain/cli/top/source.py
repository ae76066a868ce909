"""Where `megatrain top` gets its frames: a driver's /status."""

import json
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from megatrain.bus.telemetry.running import running_drivers
from megatrain.errors import BusError, ConfigError

ANSWER_S = 3.0
"""Seconds that a driver gets to answer."""
GONE_S = 15.0
"""Seconds without an answer after which it counts as ended."""
MAX_BYTES = 16 << 20
"""Cap of a status, which is a few hundred bytes a rank."""
FORMAT = 1
"""The status that is understood here."""
HINT = "initialize(mode='driver', metrics_port=0, ...) serves it, and the driver's log says where"


class Source:
    """The status of one driver, again and again."""

    def __init__(self, address: str) -> None:
        """Raises ConfigError for what is no address."""
        self.url = normalise(address)
        # No proxy: the driver is on this host, most likely, and what it says is nobody's business.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._last: dict[str, Any] = {}
        self._heard_at = time.monotonic()

    def read(self) -> dict[str, Any]:
        """Return the status.  Raises BusError if nothing answers, or something else does."""
        try:
            with self._opener.open(f"{self.url}/status", timeout=ANSWER_S) as answer:
                status = json.loads(answer.read(MAX_BYTES))
        except (OSError, ValueError) as error:
            raise BusError(
                f"no driver tells its status at {self.url}: {error}", hint=HINT
            ) from error
        if not isinstance(status, dict) or status.get("megatrain_status") != FORMAT:
            raise BusError(
                f"what answers at {self.url} is no driver of this version of megatrain", hint=HINT
            )
        self._heard_at = time.monotonic()
        self._last = clean(status)
        return self._last

    def read_again(self) -> dict[str, Any] | None:
        """Return the status, the last one with `stale_s` if none comes; None if it ended."""
        try:
            return self.read()
        except BusError as error:
            stale_s = time.monotonic() - self._heard_at
            if _is_refused(error) or stale_s > GONE_S:
                return None
            return self._last | {"stale_s": stale_s}


def choose_address(address: str | None, pid: int | None) -> str:
    """Return the address that was given, or that of the user's driver on this host.

    Raises ConfigError if there is none, or more than one.
    """
    if address is not None:
        if pid is not None:
            raise ConfigError(f"ADDRESS and --pid name the driver twice: {address}, {pid}")
        return address
    found = [each for each in running_drivers() if pid in (None, each.pid)]
    if len(found) == 1:
        return found[0].url
    what = "no driver of yours" if pid is None else f"no driver with pid {pid}"
    if not found:
        raise ConfigError(f"{what} serves its status on this host", hint=HINT)
    known = "\n".join(f"  {each.url}  (pid {each.pid})" for each in found)
    raise ConfigError(f"{len(found)} drivers run on this host; name one of them:\n{known}")


def normalise(address: str) -> str:
    """Return an address as http://HOST:PORT; a port or HOST:PORT will do.  Raises ConfigError."""
    text = f"127.0.0.1:{address}" if address.isdigit() else address
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port:
        raise ConfigError(f"an address must be http://HOST:PORT: {address!r}", hint=HINT)
    path = parts.path.rstrip("/").removesuffix("/metrics").removesuffix("/status")
    return f"{parts.scheme}://{parts.netloc}{path}"


def clean(value: Any) -> Any:
    """Return a value without letters that would move a terminal's cursor."""
    if isinstance(value, dict):
        return {clean(key): clean(each) for key, each in value.items()}
    if isinstance(value, list):
        return [clean(each) for each in value]
    if isinstance(value, str):
        return "".join(each if each.isprintable() else " " for each in value)
    return value


def _is_refused(error: BusError) -> bool:
    cause = error.__cause__
    reason = cause.reason if isinstance(cause, urllib.error.URLError) else cause
    return isinstance(reason, ConnectionRefusedError)
