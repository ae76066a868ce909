"""Commands whose reply has not come, and the futures that wait for them.  No torch."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

Finish = Callable[[Any, list[str]], Any]

CANCEL_S = 30.0
"""Seconds that a cancellation waits for rank 0's word."""


class CommandFuture(Future[Any]):
    """The future of a command on the ranks.  `cancel` works until the ranks begin with it."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        super().__init__()
        self._ask = ask

    def cancel(self) -> bool:
        """Ask the ranks to leave it out; tell whether they will.  Waits for a round trip."""
        if self.done():
            return self.cancelled()
        return self._ask()

    def cancel_locally(self) -> None:
        """Count as cancelled: the ranks have said so."""
        super().cancel()
        self.set_running_or_notify_cancel()


@dataclass(slots=True)
class Pending:
    """One command that was accepted."""

    seq: int
    name: str
    payload: bytes
    deadline_s: float
    future: Future[Any]
    finish: Finish
    """From value and names of what is trained to the future's result."""
    accepted_at: float = field(default_factory=time.monotonic)
    troubles: list[str] = field(default_factory=list)
    """What ranks were lost over it, by its signature."""
    answer: "Answer | None" = None
    """To a cancellation that was asked for."""


class Answer:
    """Whether a cancellation was in time, once that is known."""

    def __init__(self) -> None:
        self._known = threading.Event()
        self._in_time = False

    def set(self, in_time: bool) -> None:
        """Say how it went."""
        self._in_time = in_time
        self._known.set()

    def wait(self) -> bool:
        """Return how it went; False if that is not heard in time."""
        self._known.wait(CANCEL_S)
        return self._in_time
