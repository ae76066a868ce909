"""How fast counters grow, seen only while somebody looks."""

from collections import deque

WINDOW_S = 10.0
"""A rate is of the last so many seconds: a pass may take some."""
EVERY_S = 0.5
"""Looks that follow each other sooner add nothing, however many pages are open."""


class Rates:
    """Rates of counters by name."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[tuple[float, int]]] = {}

    def see(self, name: str, count: int, now: float) -> float:
        """Take in a counter at a time in seconds; return what it gains a second, 0 at first."""
        seen = self._seen.setdefault(name, deque())
        while seen and now - seen[0][0] > WINDOW_S:
            seen.popleft()
        if not seen or now - seen[-1][0] >= EVERY_S:
            seen.append((now, count))
        began, first = seen[0]
        return (count - first) / (now - began) if now > began else 0.0
