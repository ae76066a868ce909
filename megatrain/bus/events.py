"""What a driver tells those who watch it: metrics, traces, the live view.  No torch."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened on the bus."""

    kind: Literal["accepted", "done", "failed", "cancelled", "lost", "recovered", "snapshot"]
    seq: int = 0
    """Of the command that it is about; 0 for none."""
    command: str = ""
    """Name of the command's class."""
    at: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    seconds: float = 0.0
    """From acceptance to reply; of `recovered`, without ranks."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a command's phases on rank 0: validate, execute."""
    num_bytes: int = 0
    """Of the encoded command, or reply."""
    text: str = ""
    """What went wrong."""


Observer = Callable[[Event], None]


class Observers:
    """Functions that are called with each event, from the thread in which it happens."""

    def __init__(self) -> None:
        self._all: list[Observer] = []

    def add(self, observer: Observer) -> None:
        """Call a function with every event from now on; it must not wait for the driver."""
        self._all.append(observer)

    def remove(self, observer: Observer) -> None:
        """Call it no longer."""
        self._all.remove(observer)

    def tell(self, event: Event) -> None:
        """Call all; an observer that fails is logged, and harms nobody."""
        for observer in list(self._all):
            try:
                observer(event)
            except Exception:
                logger.exception("an observer of the bus failed")
