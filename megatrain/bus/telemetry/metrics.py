"""Prometheus metrics of one driver: counters from its events, gauges when somebody scrapes.

The registry is the driver's own, so that several drivers, and the script's own metrics, do not mix.
No torch.
"""

import time

from prometheus_client import CollectorRegistry, Counter, Summary

from megatrain.bus.events import Event
from megatrain.bus.telemetry.beat_log import BeatLog
from megatrain.bus.telemetry.command_series import CommandSeries, bounded
from megatrain.bus.telemetry.gauges import Gauges
from megatrain.bus.telemetry.recent import RecentCommands
from megatrain.bus.telemetry.watched import Watched, beats_of


class BusMetrics:
    """Counts what happens on a driver's bus until it is closed."""

    def __init__(self, driver: Watched, registry: CollectorRegistry | None = None) -> None:
        """`registry` is a new one unless it is given."""
        self.driver = driver
        self.registry = CollectorRegistry() if registry is None else registry
        self.began = time.monotonic()
        self.is_recovering = False
        self.log = BeatLog(lambda: beats_of(driver))
        self.recent = RecentCommands()
        self._commands = CommandSeries(self.registry)
        self._losses = Counter("megatrain_losses", "Losses of ranks.", registry=self.registry)
        self._recoveries = Summary(
            "megatrain_recovery_seconds", "Seconds without ranks.", registry=self.registry
        )
        self._snapshots = Counter(
            "megatrain_snapshots", "Snapshots that are whole.", registry=self.registry
        )
        self.registry.register(Gauges(driver, self.log))
        driver.observers.add(self._note)
        self.log.start()

    def close(self) -> None:
        """Count no longer."""
        self.log.close()
        self.driver.observers.remove(self._note)

    def _note(self, event: Event) -> None:
        match event.kind:
            case "accepted":
                self._commands.accept(event)
            case "done" | "failed" | "cancelled":
                self._commands.end(event)
                self.recent.add(bounded(event.command), event.kind, event.seconds)
            case "lost":
                self.is_recovering = True
                self._losses.inc()
            case "recovered":
                self.is_recovering = False
                self._recoveries.observe(event.seconds)
            case "snapshot":
                self._snapshots.inc()
