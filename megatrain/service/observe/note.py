"""What a request is about, for whoever writes a log line or a header while it is served."""

import contextlib
import random
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatrain.service.observe.timing import Timing


class Traced(Protocol):
    """A request that was accepted, as its spans show it."""

    id: str
    kind: str
    run: str | None
    tokens: int
    timing: Timing


class Spans(Protocol):
    """Makes spans: see tracing."""

    def request(self, ticket: Traced, context: Any, *, failed: bool) -> None:
        """Tell of a request that is over; `context` is that of its HTTP request."""


@dataclass(slots=True)
class Note:
    """One request over HTTP, and what it turned out to be about."""

    request: str = field(default_factory=lambda: f"{random.getrandbits(128):032x}")
    """What the client or this service calls it: X-Request-ID."""
    project: str = ""
    run: str = ""
    trace_id: str = ""
    span_id: str = ""
    spans: Spans | None = None
    context: Any = None
    """OpenTelemetry's, with the request's span."""


_current: ContextVar[Note | None] = ContextVar("megatrain_note", default=None)


def current() -> Note | None:
    """Return the note of the request that is served here, if one is."""
    return _current.get()


@contextlib.contextmanager
def serving(note: Note | None) -> Iterator[None]:
    """Have log lines tell of a request; those of work for it later on too."""
    token = _current.set(note)
    try:
        yield
    finally:
        _current.reset(token)


def about(*, project: str = "", run: str | None = None) -> None:
    """Add to the current note, if there is one, what its request is about."""
    note = _current.get()
    if note is not None:
        note.project, note.run = project or note.project, run or note.run
