"""When a request got how far, and what of that was the ranks' own time."""

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Spent:
    """What the commands of a pass or operation took."""

    bus_s: float = 0.0
    """From the acceptance by the driver to the reply, the ranks' time included."""
    ranks_s: float = 0.0
    """What rank 0 says of itself: to check and to do the commands."""


@dataclass(slots=True)
class Timing:
    """Of one request, by time.monotonic; 0 for what has not happened."""

    accepted: float = field(default_factory=time.monotonic)
    """When it was read and parsed."""
    committed: float = 0.0
    began: float = 0.0
    """When it left its queue."""
    replied: float = 0.0
    """When the ranks' answer had come."""
    ended: float = 0.0
    """When its result was there."""
    spent: Spent = field(default_factory=Spent)
    members: int = 1
    """Requests that shared its pass."""

    def phases(self) -> dict[str, float]:
        """Return the seconds of each phase, in order; {} while there is no result."""
        if not self.ended:
            return {}
        found = {"commit": self.committed - self.accepted} if self.committed else {}
        if not self.began:
            return found
        found["queue"] = self.began - (self.committed or self.accepted)
        if not self.replied:
            return found | {"work": self.ended - self.began}
        work, spent = self.replied - self.began, self.spent
        found["submit"] = work - spent.bus_s
        found["bus"] = spent.bus_s - spent.ranks_s
        found["ranks"] = spent.ranks_s
        found["result"] = self.ended - self.replied
        return {name: max(0.0, seconds) for name, seconds in found.items()}
