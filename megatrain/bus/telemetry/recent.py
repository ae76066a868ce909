"""The last commands of each name: how often, how long.  For the live view.  No torch."""

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

KEPT = 256
"""Times of each name that the quantiles are of."""
WINDOW_S = 60.0
"""Seconds over which the rate is a mean."""


class RecentCommands:
    """Times of the last commands by name; any thread may add and ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._outcomes: dict[str, Counter[str]] = {}
        self._times: dict[str, deque[tuple[float, float]]] = {}
        """By name: when it was done, and the seconds that it took."""

    def add(self, name: str, outcome: str, seconds: float) -> None:
        """Take in a command that is over."""
        with self._lock:
            if name not in self._times:
                self._outcomes[name] = Counter()
                self._times[name] = deque(maxlen=KEPT)
            self._outcomes[name][outcome] += 1
            if outcome == "done":
                self._times[name].append((time.monotonic(), seconds))

    def summary(self) -> list[dict[str, Any]]:
        """Return a row for each name."""
        now = time.monotonic()
        with self._lock:
            rows = [
                (name, dict(self._outcomes[name]), list(times))
                for name, times in self._times.items()
            ]
        return [
            {
                "name": name,
                **{each: outcomes.get(each, 0) for each in ("done", "failed", "cancelled")},
                "per_second": self._per_second(times, now),
                "p50_s": quantile([seconds for _, seconds in times], 0.5),
                "p95_s": quantile([seconds for _, seconds in times], 0.95),
            }
            for name, outcomes, times in sorted(rows)
        ]

    def _per_second(self, times: Sequence[tuple[float, float]], now: float) -> float:
        recent = [at for at, _ in times if at > now - WINDOW_S]
        if not recent:
            return 0.0
        # Where more were done in the window than are kept, those that are kept span less of it.
        since = recent[0] if len(recent) == KEPT else max(self._began, now - WINDOW_S)
        return len(recent) / max(now - since, 1e-3)


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the value that so large a share of all does not exceed; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
