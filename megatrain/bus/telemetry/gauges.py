"""What holds of a driver at the moment of a scrape: queues, ranks, memory, adapters.  No torch."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatrain.bus.beat import Beat
from megatrain.bus.telemetry.beat_log import BeatLog
from megatrain.bus.telemetry.watched import (
    Watched,
    adapters_of,
    beats_of,
    queued_on_ranks,
    restarts_of,
)


class Gauges(Collector):
    """Reads a driver whenever somebody scrapes; between scrapes it costs nothing."""

    def __init__(self, driver: Watched, log: BeatLog) -> None:
        self._driver, self._log = driver, log

    def describe(self) -> list[Metric]:
        """Return nothing, so that a registry does not collect in order to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Return all, as prometheus_client asks for them."""
        beats = beats_of(self._driver)
        yield from self._queues()
        yield from self._tokens()
        yield from self._ranks(beats)
        yield _labelled(
            "megatrain_adapters_resident", "Adapters by tier.", "tier", adapters_of(beats)
        )

    def _queues(self) -> Iterator[Metric]:
        driver = self._driver
        policy = driver.config.recovery
        yield GaugeMetricFamily(
            "megatrain_commands_pending",
            "Commands that were accepted and not answered.",
            value=driver.num_pending,
        )
        yield GaugeMetricFamily(
            "megatrain_commands_queued_on_ranks",
            "Commands that wait on the ranks, by their last word.",
            value=queued_on_ranks(driver),
        )
        yield GaugeMetricFamily(
            "megatrain_restarts_left",
            "Losses of ranks that are mended before the driver gives up.",
            value=max(0, policy.max_restarts - restarts_of(driver)),
        )

    def _tokens(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "megatrain_tokens", "Tokens in passes.", value=float(self._log.tokens)
        )
        yield GaugeMetricFamily(
            "megatrain_tokens_per_second",
            "Tokens in passes by second, over the last minute.",
            value=self._log.tokens_per_second(),
        )

    def _ranks(self, beats: list[Beat]) -> Iterator[Metric]:
        now = time.monotonic()
        for name, text, values in (
            (
                "resident_bytes",
                "Memory of the rank's process.",
                {beat.rank: beat.resident_bytes for beat in beats},
            ),
            (
                "device_bytes",
                "Memory that the rank has reserved on its device.",
                {b.rank: b.device_bytes for b in beats if hasattr(b, "device_bytes")},
            ),
            (
                "silence_seconds",
                "Seconds since the rank's last beat.",
                {beat.rank: self._log.silence(beat.rank, now) for beat in beats},
            ),
            (
                "command_running_seconds",
                "Seconds since the rank began its command; 0 between commands.",
                {beat.rank: beat.running_s for beat in beats},
            ),
        ):
            yield _labelled(f"megatrain_rank_{name}", text, "rank", values)


def _labelled(name: str, text: str, label: str, values: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([str(key)], float(value))
    return family
