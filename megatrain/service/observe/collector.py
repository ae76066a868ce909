"""All metrics of one service: what its parts have counted, and what holds when it is asked.

Labels are models, kinds, endpoints and ranks: nothing that grows with projects, keys or runs.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatrain.service.observe.series import PREFIX, HttpSeries, merged


class Counted(Protocol):
    """The service: `Hub` has it.  Before it is open, there is less of it."""

    is_ready: bool
    is_draining: bool
    futures: Any
    store: Any
    deployments: Any


class ServiceCollector(Collector):
    """Reads a hub."""

    def __init__(self, hub: Counted, http: HttpSeries) -> None:
        self._hub, self._http = hub, http
        self._process = psutil.Process()

    def describe(self) -> list[Metric]:
        """Return nothing, so that a registry does not collect in order to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Return all, as prometheus_client asks for them."""
        hub = self._hub
        parts: list[Iterable[Metric]] = [
            self._http.collect(),
            hub.futures.series.collect(),
            hub.store.series.collect(),
            self._own(),
        ]
        for name, deployment in hub.deployments.items():
            parts.append(deployment.training.series.collect())
            parts.append(_model(name, deployment))
        return merged(parts)

    def _own(self) -> Iterator[Metric]:
        hub = self._hub
        yield _gauge("ready", "Whether work is accepted.", hub.is_ready and not hub.is_draining)
        yield _gauge("futures_open", "Requests without a result.", hub.futures.num_open)
        yield _gauge("results_bytes", "Results kept in memory.", hub.futures.kept_bytes)
        with self._process.oneshot():
            memory, times = self._process.memory_info().rss, self._process.cpu_times()
            files, threads = self._process.num_fds(), self._process.num_threads()
        yield _gauge("process_resident_bytes", "Memory of the service's process.", memory)
        yield _gauge("process_open_files", "Files and sockets of the service's process.", files)
        yield _gauge("process_threads", "Threads of the service's process.", threads)
        used = times.user + times.system
        yield _count("process_cpu_seconds", "Processor time of the service's process.", used)


def make_registry(hub: Counted, http: HttpSeries) -> CollectorRegistry:
    """Return a hub's own registry."""
    registry = CollectorRegistry()
    registry.register(ServiceCollector(hub, http))
    return registry


def _model(name: str, deployment: Any) -> Iterator[Metric]:
    """Return what is to be told of one base model."""
    yield from _work(name, deployment)
    yield from _ranks(name, deployment.fleet)
    yield from _sampler(name, deployment)
    yield from _mismatch(name, deployment.publisher.monitor.figures())


def _work(name: str, deployment: Any) -> Iterator[Metric]:
    scheduler, sampling = deployment.scheduler, deployment.sampling
    yield _gauge("runs", "Runs whose adapters the ranks have.", len(scheduler.runs), model=name)
    waiting = {"training": scheduler.num_waiting, "sampling": sampling.num_waiting}
    running = {"training": scheduler.num_running, "sampling": sampling.running}
    yield _by("requests_queued", "Requests in queues.", "kind", waiting, model=name)
    yield _by(
        "requests_running", "Requests given to ranks, sequences given to a sampler.", "kind",
        running, model=name,
    )  # fmt: skip
    yield _count("sampled_tokens", "Tokens that were drawn.", deployment.sampled_tokens, model=name)


def _ranks(name: str, fleet: Any) -> Iterator[Metric]:
    beats, watch = fleet.health.get("beats", []), fleet.bus_watch
    yield _gauge("ranks", "Ranks that there should be.", fleet.served.ranks, model=name)
    yield _gauge("ranks_alive", "Ranks with a sign of life.", len(beats), model=name)
    yield _gauge("ranks_ready", "Whether they take commands.", fleet.is_ready, model=name)
    yield _gauge("commands_pending", "Commands without an answer.", fleet.num_pending, model=name)
    yield _count("rank_losses", "Losses of ranks.", watch.losses, model=name)
    yield _count("rank_recoveries", "Losses that were mended.", watch.recoveries, model=name)
    yield _count("rank_recovery_seconds", "Seconds without ranks.", watch.recovery_s, model=name)
    memory = {beat.rank: beat.resident_bytes for beat in beats}
    yield _by("rank_resident_bytes", "Memory of a rank.", "rank", memory, model=name)


def _sampler(name: str, deployment: Any) -> Iterator[Metric]:
    status = deployment.sampler.status()
    labels = {"model": name, "engine": status.engine}
    yield _gauge("sampler_ready", "Whether the engine answers.", status.ready, **labels)
    yield _gauge("sampler_adapters", "Adapters that it holds.", len(status.adapters), **labels)
    yield _gauge("sampler_running", "Sequences that it draws.", status.running, **labels)
    yield _gauge("sampler_waiting", "Sequences that wait in it.", status.waiting, **labels)
    yield _count("sampler_restarts", "Starts after the first.", status.restarts, **labels)


def _mismatch(name: str, figures: list[dict[str, Any]]) -> Iterator[Metric]:
    """Return sampler against trainer, of all versions that are remembered, without their names."""
    tokens = sum(each["tokens"] for each in figures)
    yield _gauge("mismatch_versions", "Versions that were compared.", len(figures), model=name)
    if not tokens:
        return
    text = "Log-probability, sampler against trainer: "
    for part, more in (("mean", "mean absolute difference."), ("k3", "estimated divergence.")):
        value = sum(each[part] * each["tokens"] for each in figures) / tokens
        yield _gauge(f"mismatch_{part}", text + more, value, model=name)
    largest = max(each["max"] for each in figures)
    yield _gauge("mismatch_max", text + "largest difference.", largest, model=name)


def _gauge(name: str, text: str, value: float, **labels: str) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=list(labels))
    family.add_metric(list(labels.values()), float(value))
    return family


def _count(name: str, text: str, value: float, **labels: str) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=list(labels))
    family.add_metric(list(labels.values()), float(value))
    return family


def _by(name: str, text: str, label: str, values: Mapping[Any, float], **labels: str) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=[*labels, label])
    for key, value in values.items():
        family.add_metric([*labels.values(), str(key)], float(value))
    return family
