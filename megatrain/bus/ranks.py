"""Where a driver's ranks come from: what it asks of whoever starts them.  No torch."""

from typing import Protocol

from megatrain.bus.address import Address


class Ranks(Protocol):
    """Ranks that can be started, and started again."""

    def start(self) -> Address:
        """Start them, anew if they have run before; return where they will listen."""

    def failure(self) -> str | None:
        """Return which of them have ended, and how; None if none that is known of has."""

    def output(self) -> str:
        """Return what those that failed said last; empty if that is not known here."""

    def close(self, *, orderly: bool = True) -> None:
        """End them; with `orderly` they are ending by themselves, and get some time for it."""


class RanksAt:
    """Ranks that somebody else starts, torchrun say, and starts again when they end."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def start(self) -> Address:
        """Return where they listen."""
        return self.address

    def failure(self) -> str | None:
        """Return None: their processes are not seen from here."""
        return None

    def output(self) -> str:
        """Return nothing: their output is elsewhere."""
        return ""

    def close(self, *, orderly: bool = True) -> None:
        """Leave them be: the next driver finds them."""
