"""One run's requests in the order of their numbers, whatever the order in which they come."""

from collections.abc import Iterable
from itertools import islice

MOST_MISSING = 16
"""Missing numbers that are named: a client that sends its greatest number first lacks billions."""


class RunQueue[T]:
    """Hands out requests strictly by number, and waits for those that are missing."""

    def __init__(self, next_seq: int = 0, *, done: Iterable[int] = ()) -> None:
        """`done`: numbers from `next_seq` on that need not come any more."""
        self.next_seq = next_seq
        self._waiting: dict[int, T] = {}
        self._done = set(done)
        self.gap_since: float | None = None
        """When the first request came that waits for a lower number."""
        self._skip()

    @property
    def last(self) -> int:
        """The greatest number that has come."""
        return max(self.next_seq - 1, max(self._waiting, default=-1), max(self._done, default=-1))

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, seq: int, request: T, now: float) -> bool:
        """Take a request in; return False, and do not, if its number is over."""
        if seq < self.next_seq or seq in self._done:
            return False
        self._waiting[seq] = request
        self._look(now)
        return True

    def peek(self) -> T | None:
        """Return the request whose turn it is, if it is there."""
        return self._waiting.get(self.next_seq)

    def pop(self, now: float) -> T:
        """Take out the request whose turn it is."""
        request = self._waiting.pop(self.next_seq)
        self.next_seq += 1
        self._skip()
        self._look(now)
        return request

    def missing(self) -> list[int]:
        """Return the first of the numbers that the waiting requests wait for."""
        last = max(self._waiting, default=self.next_seq - 1)
        there = self._waiting.keys() | self._done
        gaps = (seq for seq in range(self.next_seq, last) if seq not in there)
        return list(islice(gaps, MOST_MISSING))

    def give_up_gap(self, now: float) -> list[T]:
        """Take out what waits behind a gap; its numbers and the missing ones are over."""
        if self.peek() is not None:
            return []
        last = max(self._waiting, default=self.next_seq - 1)
        given_up = self.drain()
        self.next_seq = last + 1
        self._done = {seq for seq in self._done if seq > last}
        self._skip()
        self._look(now)
        return given_up

    def drain(self) -> list[T]:
        """Take out all that waits."""
        left = [self._waiting.pop(seq) for seq in sorted(self._waiting)]
        self.gap_since = None
        return left

    def _skip(self) -> None:
        while self.next_seq in self._done:
            self._done.discard(self.next_seq)
            self.next_seq += 1

    def _look(self, now: float) -> None:
        """Note since when there is a gap in front of what waits."""
        if not self._waiting or self.peek() is not None:
            self.gap_since = None
        elif self.gap_since is None:
            self.gap_since = now
