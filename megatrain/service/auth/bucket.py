"""A limit of requests a second, with bursts."""

import time

from megatrain.errors import BusyError

BURST_S = 10.0
"""A burst may be so many seconds' worth."""


class Buckets:
    """A token bucket for each key."""

    def __init__(self, rate_per_s: float | None) -> None:
        self._rate = rate_per_s
        self._levels: dict[int, tuple[float, float]] = {}

    def take(self, key_id: int) -> None:
        """Count a request.  Raises BusyError where there were too many."""
        if self._rate is None:
            return
        now, most = time.monotonic(), max(1.0, self._rate * BURST_S)
        level, when = self._levels.get(key_id, (most, now))
        level = min(most, level + (now - when) * self._rate)
        if level < 1.0:
            self._levels[key_id] = level, now
            raise BusyError(
                f"this key may send {self._rate:g} requests a second",
                hint="send fewer, or ask the operator for more",
                retry_after_s=(1.0 - level) / self._rate,
            )
        self._levels[key_id] = level - 1.0, now
