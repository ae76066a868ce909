"""A command's phases: on the way and in line, checked by the ranks, done by them.  No torch."""

from megatrain.bus.events import Event

PHASES = ("queue", "validate", "execute")
"""In the order in which they happen."""


def phases_of(event: Event) -> dict[str, float]:
    """Return the seconds of each phase, in order; nothing if the ranks have not told.

    Ranks tell of validate and execute; the rest of the time the command was on its way or in line.
    """
    told = {name: event.phases[name] for name in PHASES[1:] if name in event.phases}
    if not told:
        return {}
    return {"queue": max(0.0, event.seconds - sum(told.values())), **told}
