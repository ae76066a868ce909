"""Commands whose reply has not come, and the futures that wait for them.  No torch."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from megatrain.bus.codec import Failure
from megatrain.bus.events import Event
from megatrain.bus.failures import error_of

Finish = Callable[[Any, list[str]], Any]

CANCEL_S = 30.0
"""Seconds that a cancellation waits for rank 0's word."""


class CommandFuture(Future[Any]):
    """The future of a command on the ranks.  `cancel` works until the ranks begin with it."""

    def __init__(
        self, ask: Callable[[], bool], defer: Callable[[Callable[[], object]], object]
    ) -> None:
        """`ask` asks the ranks to leave it out; `defer` has callbacks run on another thread."""
        super().__init__()
        self._ask, self._defer = ask, defer

    def _invoke_callbacks(self) -> None:
        """Run callbacks elsewhere: whoever sets the result reads what ranks say."""
        self._defer(super()._invoke_callbacks)  # type: ignore[misc]

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


def value_alone(value: Any, trained: list[str]) -> Any:
    """Return the value as it came."""
    return value


def resolve(pending: Pending, reply: dict[str, Any]) -> None:
    """Give a future what a reply says."""
    failure = reply.get("failure")
    if isinstance(failure, Failure):
        pending.future.set_exception(error_of(failure))
        return
    try:
        value = pending.finish(reply.get("value"), list(reply.get("trained", ())))
    except Exception as error:  # noqa: BLE001 - raised where the result is asked for
        pending.future.set_exception(error)
        return
    pending.future.set_result(value)


def reply_event(pending: Pending, reply: dict[str, Any], num_bytes: int) -> Event:
    """Return what watchers hear of a reply."""
    failure, times = reply.get("failure"), reply.get("times") or {}
    return Event(
        "done" if failure is None else "failed",
        pending.seq,
        pending.name,
        seconds=time.monotonic() - pending.accepted_at,
        phases={str(name): float(value) for name, value in times.items()},
        num_bytes=num_bytes,
        text=failure.message if isinstance(failure, Failure) else "",
    )
