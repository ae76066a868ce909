"""What is wrong with ranks, and whether it is what was wrong before.  No torch."""

import re
import time
from dataclasses import dataclass

from megatrain.bus.beat import patience
from megatrain.bus.link import Link
from megatrain.bus.ranks import Ranks
from megatrain.bus.watch import doing

_CHANGING = re.compile(r"pid \d+|\d+(\.\d+)? s\b|\bcommand \d+|host [^,)]*")
"""What differs each time: process ids, seconds, numbers of commands, hosts."""
SETTLE_S = 0.2
"""Seconds in which what rank 0 says of a loss may still arrive."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why ranks cannot go on."""

    text: str
    is_late: bool = False
    """A rank is alive, but did not finish in time."""
    stacks: str = ""

    @property
    def signature(self) -> str:
        """The same for two troubles that are alike."""
        return _CHANGING.sub("", self.text)

    def __str__(self) -> str:
        return f"{self.text}\n{self.stacks}" if self.stacks else self.text


def trouble_of(ranks: Ranks, link: Link, heartbeat_timeout_s: float) -> Trouble | None:
    """Return what is wrong, if anything is."""
    if (failure := ranks.failure()) is not None:
        time.sleep(SETTLE_S)
        return _told(link) or Trouble(failure)
    if link.lost is not None:
        return _told(link)
    if link.error is not None:
        # Whoever started the ranks may know better a moment later.
        time.sleep(SETTLE_S)
        return _told(link) or Trouble(ranks.failure() or link.error.message)
    silence, beats = time.monotonic() - link.heard_at, link.health.get("beats")
    if silence > heartbeat_timeout_s * (patience(beats[0]) if beats else 1.0):
        who = f"rank 0 (host {link.welcome.hosts[0]}, pid {link.welcome.pids[0]})"
        what = doing(beats[0]) if beats else ""
        return Trouble(f"{who} has given no sign of life for {silence:.1f} s{what}")
    return None


def _told(link: Link) -> Trouble | None:
    """Return what rank 0 said of a loss."""
    if link.lost is None:
        return None
    told = link.lost
    return Trouble(str(told["text"]), bool(told.get("late")), str(told["stacks"]))
