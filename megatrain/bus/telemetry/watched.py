"""What telemetry asks of a driver, also while that has not reached its ranks yet.  No torch."""

from typing import Any, Protocol

from megatrain.bus.beat import Beat
from megatrain.bus.events import Observers
from megatrain.config.bus import BusConfig


class Watched(Protocol):
    """A driver as seen from here; each as Driver says it."""

    config: BusConfig
    observers: Observers
    supervisor: Any

    @property
    def health(self) -> dict[str, Any]: ...
    @property
    def welcome(self) -> Any: ...
    @property
    def losses(self) -> list[str]: ...
    @property
    def num_pending(self) -> int: ...
    @property
    def is_over(self) -> bool: ...


# A driver gets its link and its supervisor when the ranks are there, and is watched before that, so
# that a taken port is refused before ranks start: hence getattr.


TIERS = ("device", "host", "disk")
"""Where an adapter may be."""


def beats_of(driver: Watched) -> list[Beat]:
    """Return the last beats of all ranks; none while there are no ranks."""
    beats: list[Beat] = getattr(driver, "health", {}).get("beats", [])
    return beats


def queued_on_ranks(driver: Watched) -> int:
    """Return how many commands have reached the ranks and wait there."""
    # Said up to a second ago: what was answered since then does not wait.
    return min(driver.num_pending, int(getattr(driver, "health", {}).get("queued", 0)))


def losses_of(driver: Watched) -> list[str]:
    """Return what was said of each loss of ranks."""
    return list(getattr(driver, "losses", []))


def restarts_of(driver: Watched) -> int:
    """Return how many restarts count against the policy at the moment."""
    return int(getattr(getattr(driver, "supervisor", None), "num_restarts", 0))


def adapters_of(beats: list[Beat]) -> dict[str, int]:
    """Return how many adapters are in each tier, as rank 0 counts them."""
    counts = beats[0].adapters if beats else {}
    return {tier: counts[tier] for tier in TIERS if tier in counts}
