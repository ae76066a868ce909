"""Slows down who shows keys that nobody has: each of them costs a look into the database.

Not against guessing, which 256 random bits prevent.  Keys that are known are never slowed down, so
that one client behind a proxy cannot lock the others out.
"""

import ipaddress
import time
from collections import OrderedDict

from megatrain.errors import BusyError

PER_S = 10.0
"""Unknown keys a second of one address."""
BURST = 100.0
MAX_ADDRESSES = 10_000
"""Addresses that are remembered; the ones that were seen longest ago are forgotten."""


class Failures:
    """A token bucket for each address that has shown an unknown key."""

    def __init__(self) -> None:
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, address: str) -> None:
        """Raise BusyError where too many unknown keys came from an address."""
        level = self._level(_network(address))
        if level < 1.0:
            raise BusyError(
                "too many unknown API keys came from this address",
                hint="wait, and look at the key",
                retry_after_s=(1.0 - level) / PER_S,
            )

    def note(self, address: str) -> None:
        """Count an unknown key."""
        network = _network(address)
        level = self._level(network)
        self._levels[network] = level - 1.0, time.monotonic()
        self._levels.move_to_end(network)
        while len(self._levels) > MAX_ADDRESSES:
            self._levels.popitem(last=False)

    def _level(self, network: str) -> float:
        now = time.monotonic()
        level, when = self._levels.get(network, (BURST, now))
        return min(BURST, level + (now - when) * PER_S)


def _network(address: str) -> str:
    """Return an address, or the /64 of one of IPv6: a single host has all of it."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if parsed.version == 4:
        return str(parsed)
    return str(ipaddress.ip_network((int(parsed), 64), strict=False))
