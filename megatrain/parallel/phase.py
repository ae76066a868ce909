"""What this rank does at the moment, for those who watch it; costs one assignment."""

from collections.abc import Callable

IDLE, VALIDATING, EXECUTING = "idle", "validating", "executing"
FORWARD, BACKWARD, GATHERING = "forward", "backward", "gathering"
STEPPING, SAVING, LOADING = "optimizer step", "saving", "loading"

_observer: Callable[[str], None] | None = None


def enter(phase: str) -> None:
    """Say which phase begins."""
    if _observer is not None:
        _observer(phase)


def observe(observer: Callable[[str], None] | None) -> None:
    """Have a function called with every phase that begins; one in a process, None ends it."""
    global _observer
    _observer = observer
