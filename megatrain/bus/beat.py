"""What a rank says of itself about once a second, and where it says so.  No torch."""

import json
from dataclasses import dataclass, field

from megatrain.parallel import phase

EXIT_LOST = 71
"""Exit status of a rank that ends since another one is lost, or itself was late."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself, about once a second."""

    rank: int
    host: str
    pid: int
    count: int = 0
    """Beats so far: one that does not grow is no life."""
    seq: int = 0
    command: str = ""
    """The command that it is doing; empty between commands."""
    phase: str = phase.IDLE
    running_s: float = 0.0
    """Seconds since the command began."""
    deadline_s: float = 0.0
    failed: bool = False
    """It raised an error and waits for the others to say so too."""
    error: str = ""
    """That error."""
    stack: str = ""
    """Python's stack of its threads, once the deadline is over."""
    resident_bytes: int = 0
    tokens: int = 0
    """Tokens in passes so far."""
    adapters: dict[str, int] = field(default_factory=dict)
    """How many are on the device, in the host's memory, on its disk."""


PATIENCE = 6.0
"""How much longer a rank may be silent while it loads: what it imports then holds all threads."""


def patience(beat: Beat) -> float:
    """Return the factor by which this rank may be silent for longer than others."""
    return PATIENCE if beat.phase == phase.LOADING else 1.0


def key(rank: int) -> str:
    """Return where a rank's beat is in the store."""
    return f"pulse/{rank}"


def read_beat(data: bytes) -> Beat:
    """Return what a rank wrote."""
    return Beat(**json.loads(data))
