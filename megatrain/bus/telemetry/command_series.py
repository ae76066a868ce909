"""Prometheus series of commands: by name, outcome and phase, and nothing that grows.  No torch."""

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram

from megatrain.bus.commands import COMMANDS
from megatrain.bus.events import Event
from megatrain.bus.telemetry.phases import PHASES, phases_of

BUCKETS_S = tuple(round(unit * 10.0**power, 6) for power in range(-3, 4) for unit in (1, 2, 5))
"""From a ping's millisecond to an hour and more."""


class CommandSeries:
    """Counts commands and their times."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"megatrain_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(
                f"megatrain_{name}", text, labels, registry=registry, buckets=BUCKETS_S
            )

        self._over = counter("commands", "Commands that are over.", "command", "outcome")
        self._sent = counter("sent_bytes", "Bytes of encoded commands.", "command")
        self._received = counter("received_bytes", "Bytes of encoded replies.", "command")
        self._seconds = histogram(
            "command_seconds", "Seconds from acceptance to reply.", "command", "outcome"
        )
        self._phases = histogram(
            "command_phase_seconds", "Seconds of a command's phases.", "command", "phase"
        )
        # Looking a series up by its labels costs more than counting; there are few.
        self._child = cache(lambda metric, *labels: metric.labels(*labels))

    def accept(self, event: Event) -> None:
        """Count a command that was accepted."""
        self._child(self._sent, bounded(event.command)).inc(event.num_bytes)

    def end(self, event: Event) -> None:
        """Count a command that is done, failed or cancelled."""
        name, child = bounded(event.command), self._child
        child(self._over, name, event.kind).inc()
        child(self._received, name).inc(event.num_bytes)
        if event.kind == "cancelled":
            return  # it took no time
        child(self._seconds, name, event.kind).observe(event.seconds)
        phases = phases_of(event)
        for phase in PHASES:
            if phase in phases:
                child(self._phases, name, phase).observe(phases[phase])


def bounded(command: str) -> str:
    """Return a command's name as a label: one of those that there are."""
    return command if command in COMMANDS else "other"
