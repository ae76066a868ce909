"""What `megatrain top` shows of a driver, as plain values of one moment.  No torch."""

import time
from typing import Any

from megatrain.bus.beat import Beat
from megatrain.bus.telemetry.metrics import BusMetrics
from megatrain.bus.telemetry.watched import (
    adapters_of,
    beats_of,
    losses_of,
    queued_on_ranks,
    restarts_of,
)

FORMAT = 1
"""Grows when a field changes its meaning."""
LOSSES = 3
"""Losses that are told in words, the last ones."""
TEXT = 400
"""Letters of each."""


def make_status(metrics: BusMetrics) -> dict[str, Any]:
    """Return everything that the live view shows."""
    driver, log = metrics.driver, metrics.log
    beats, losses = beats_of(driver), losses_of(driver)
    welcome = getattr(driver, "welcome", None)
    return {
        "megatrain_status": FORMAT,
        "state": _state(metrics, beats),
        "up_s": time.monotonic() - metrics.began,
        "platform": getattr(welcome, "platform", ""),
        "layout": dict(getattr(welcome, "mesh", {})),
        "queue": {"driver": driver.num_pending, "ranks": queued_on_ranks(driver)},
        "ranks": [_rank(beat, metrics) for beat in beats],
        "commands": metrics.recent.summary(),
        "tokens": {
            "total": log.tokens,
            "per_second": log.tokens_per_second(),
            "history": log.history(),
        },
        "adapters": adapters_of(beats),
        "losses": {"total": len(losses), "last": [text[:TEXT] for text in losses[-LOSSES:]]},
        "restarts": {
            "counted": restarts_of(driver),
            "allowed": driver.config.recovery.max_restarts,
        },
    }


def _state(metrics: BusMetrics, beats: list[Beat]) -> str:
    if metrics.driver.is_over:
        return "over"
    if metrics.is_recovering:
        return "recovering"
    return "running" if beats else "starting"


def _rank(beat: Beat, metrics: BusMetrics) -> dict[str, Any]:
    row = {
        name: getattr(beat, name)
        for name in ("rank", "host", "pid", "phase", "command", "seq", "running_s", "failed")
    }
    return row | {
        "resident_bytes": beat.resident_bytes,
        "device_bytes": getattr(beat, "device_bytes", None),
        "silent_s": metrics.log.silence(beat.rank, time.monotonic()),
    }
