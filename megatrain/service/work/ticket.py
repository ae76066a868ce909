"""One accepted request while this process knows it."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from megatrain.errors import (
    BusyError,
    ConfigError,
    DataError,
    DeniedError,
    MegatrainError,
    NonFiniteError,
    NotFoundError,
    StateError,
)
from megatrain.service.auth.meter import Charge
from megatrain.service.observe.note import Note, current
from megatrain.service.observe.timing import Timing

REFUSED = b"\0"
"""How a refusal begins among payloads: neither JSON nor a protobuf message does."""
ResultKind = Literal["json", "proto"]
Category = Literal["user", "server", "unknown"]


@dataclass(frozen=True, slots=True)
class Result:
    """What a client gets for a request."""

    data: bytes
    kind: ResultKind = "json"
    failed: bool = False

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> "Result":
        """Return a JSON result."""
        return cls(json.dumps(value, separators=(",", ":"), allow_nan=False).encode())

    @classmethod
    def of_error(cls, error: BaseException) -> "Result":
        """Return an error as the client of a future reads it."""
        said = {"error": text_of(error), "category": category_of(error)}
        return cls(json.dumps(said).encode(), failed=True)


def text_of(error: BaseException) -> str:
    """Return an error's message and way out in one line; nothing of what is inside the server."""
    if not isinstance(error, MegatrainError):
        return "the server failed; its log says why"
    text = error.message if error.hint is None else f"{error.message} ({error.hint})"
    return " ".join(text.split())


def category_of(error: BaseException) -> Category:
    """Tell whether the client can mend an error."""
    users = (ConfigError, DataError, StateError, NotFoundError, DeniedError, NonFiniteError)
    return "user" if isinstance(error, users) else "server"


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that was accepted, and its result once it has one."""

    id: str
    kind: str
    project: str
    key_id: int
    session: str
    idem: str
    """What makes it the same request when it comes again."""
    content: Any
    """The request, parsed."""
    payload: bytes
    """The request as the database keeps it."""
    run: str | None = None
    sampler: str | None = None
    seq: int = 0
    tokens: int = 0
    """What it costs, in tokens: of a sample the most that it may, until it is drawn."""
    charge: Charge | None = None
    """What it was counted as, until that is settled."""
    base_model: str = ""
    created: float = field(default_factory=time.time)
    reply: dict[str, Any] = field(default_factory=dict)
    """What the client was answered at once, besides the id."""
    committed: asyncio.Event = field(default_factory=asyncio.Event)
    refused: MegatrainError | None = None
    """Why it could not be accepted after all."""
    result: Result | None = None
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: bool = False
    task: "asyncio.Task[Any] | None" = None
    """What works on it, where that can be cancelled."""
    is_barrier: bool = True
    """Whether the run's next request waits for its end; False where the ranks redo it in order
    after a loss."""
    tag: str = ""
    """Of the command that an earlier process had given to the ranks for it."""
    timing: Timing = field(default_factory=Timing)
    note: Note | None = field(default_factory=current)
    """Of the HTTP request that brought it; None once it has a result."""

    @property
    def is_refused(self) -> bool:
        """Whether it was found wrong when it came: it is told so when its turn comes, alone."""
        return isinstance(self.content, MegatrainError)


def busy(what: str, limit: int, retry_after_s: float = 1.0) -> BusyError:
    """Return the error for a queue that is full."""
    return BusyError(
        f"{limit} requests of {what} wait already",
        hint="wait for some of them, then send again",
        retry_after_s=retry_after_s,
    )
