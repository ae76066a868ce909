"""What a service adds to the ranks' own time: one client, one datum, one call after the other."""

import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from megatrain.cli.bench.service.data import draw_datum
from megatrain.cli.bench.service.scrape import Scrape, scrape

WARM_UP = 10
KIND = "forward_backward"
CLIENT = "client and HTTP"
"""What is left of a round trip: the client's own work, both requests' ways, parsing."""


@dataclass(slots=True)
class Overhead:
    """Milliseconds of each call."""

    tokens: int
    round_trip: list[float] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    """The rest, by what it went to."""

    @property
    def overhead(self) -> list[float]:
        """Round trips without the ranks' own time."""
        return [a - b for a, b in zip(self.round_trip, self.ranks, strict=True)]

    def note(self, round_trip_ms: float, before: Scrape, after: Scrape) -> None:
        """Take in a call, and what the service had counted before and after it.

        Raises RuntimeError if others have used the service meanwhile.
        """
        calls = _grown(before, after, "request_seconds_count")
        if calls != 1:
            raise RuntimeError(f"somebody else uses this service: {calls:g} calls, not 1")
        found = {
            phase: 1e3 * _grown(before, after, "request_phase_seconds_sum", phase=phase)
            for phase in after.labels("request_phase_seconds_sum", "phase")
        }
        self.round_trip.append(round_trip_ms)
        self.ranks.append(found.pop("ranks"))
        served = 1e3 * _grown(before, after, "request_seconds_sum")
        for phase, value in ({CLIENT: round_trip_ms - served} | found).items():
            self.phases.setdefault(phase, []).append(value)


def _grown(before: Scrape, after: Scrape, name: str, **labels: str) -> float:
    return after.total(name, kind=KIND, **labels) - before.total(name, kind=KIND, **labels)


def measure(
    training: Any, http: httpx.Client, *, calls: int, tokens: int, vocabulary: int
) -> Overhead:
    """Return what `calls` calls took; `training` is a TrainingClient that nobody else uses."""
    draw, found = random.Random(0), Overhead(tokens)
    before = scrape(http)
    for number in range(WARM_UP + calls):
        datum = draw_datum(draw, tokens, vocabulary)
        began = time.perf_counter()
        training.forward_backward([datum], "cross_entropy").result()
        seconds = time.perf_counter() - began
        after = scrape(http)
        if number >= WARM_UP:
            found.note(1e3 * seconds, before, after)
        before = after
    return found


def lines(found: Overhead) -> list[list[str]]:
    """Return the rows of a table: what, median, 90th percentile, in milliseconds."""
    rows = [("round trip", found.round_trip), ("ranks' own time", found.ranks)]
    rows += [("overhead", found.overhead)]
    rows += [(f"  {phase}", values) for phase, values in found.phases.items()]
    return [[name, *(f"{each:.2f}" for each in quantiles(values))] for name, values in rows]


def quantiles(values: list[float]) -> tuple[float, float]:
    """Return the median and the 90th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, len(ordered) * 9 // 10)]
