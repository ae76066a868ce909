"""What a base model's driver tells: the ranks' own time for each command, and losses of ranks."""

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar

from megatrain.bus.events import Event, Observers
from megatrain.service.observe.timing import Spent

_spent: ContextVar[Spent | None] = ContextVar("megatrain_spent", default=None)


@contextlib.contextmanager
def charged_to(spent: Spent) -> Iterator[None]:
    """Add up there what commands take that are submitted meanwhile."""
    token = _spent.set(spent)
    try:
        yield
    finally:
        _spent.reset(token)


def charged() -> Spent | None:
    """Return where the time of commands is added up here."""
    return _spent.get()


class BusWatch:
    """An observer of one base model's drivers, one after the other."""

    def __init__(self) -> None:
        self.losses = self.recoveries = 0
        self.recovery_s = 0.0
        """Seconds without ranks, until they were there again."""
        self._submitting = threading.local()
        self._open: dict[int, Spent] = {}
        """By the number of a command that was not answered."""

    def attach(self, observers: Observers) -> None:
        """Watch a driver that was just made, instead of the one before."""
        self._open.clear()
        observers.add(self._note)

    @contextlib.contextmanager
    def submitting(self, spent: Spent | None) -> Iterator[None]:
        """Charge the command that this thread submits meanwhile."""
        self._submitting.spent = spent
        try:
            yield
        finally:
            self._submitting.spent = None

    def _note(self, event: Event) -> None:
        match event.kind:
            case "accepted":
                # Told in the thread that submits.
                spent = getattr(self._submitting, "spent", None)
                if spent is not None:
                    self._open[event.seq] = spent
            case "done" | "failed" | "cancelled":
                # Told before the future has its result.
                spent = self._open.pop(event.seq, None)
                if spent is not None:
                    spent.bus_s += event.seconds
                    spent.ranks_s += sum(event.phases.values())
            case "lost":
                self.losses += 1
            case "recovered":
                self.recoveries += 1
                self.recovery_s += event.seconds
