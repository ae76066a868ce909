"""Counters and histograms that the service's parts keep of themselves; read at a scrape.

They are in no registry of their own: a hub's registry has a collector that reads them, so that
several services in one process do not mix.  Labels have few values: no projects, keys or runs.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric

from megatrain.service.observe.timing import Timing

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""From a commit to a long pass."""
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)

PREFIX = "megatrain_service_"


def counter(name: str, text: str, *labels: str) -> Counter:
    """Return a counter in no registry."""
    return Counter(PREFIX + name, text, labels, registry=None)


def histogram(
    name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
) -> Histogram:
    """Return a histogram in no registry."""
    return Histogram(PREFIX + name, text, labels, registry=None, buckets=buckets)


class Series:
    """Metrics that belong together."""

    def __init__(self, *all_of_them: Counter | Histogram) -> None:
        self._all = all_of_them

    def collect(self) -> Iterator[Metric]:
        """Return what was counted."""
        for each in self._all:
            yield from each.collect()


class HttpSeries(Series):
    """Requests over HTTP, by the route's path, which has names for its parameters."""

    def __init__(self) -> None:
        self._requests = counter(
            "http_requests", "Requests over HTTP.", "endpoint", "method", "status"
        )
        self._seconds = histogram(
            "http_request_seconds", "Seconds to an answer's first byte.", "endpoint"
        )
        super().__init__(self._requests, self._seconds)

    def answered(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(endpoint, method, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)


class RequestSeries(Series):
    """Requests that were accepted and got a result."""

    def __init__(self) -> None:
        self._ends = counter("requests", "Requests that have a result.", "kind", "outcome")
        self._seconds = histogram("request_seconds", "Seconds from acceptance to result.", "kind")
        self._phases = histogram("request_phase_seconds", "Of that, in parts.", "kind", "phase")
        super().__init__(self._ends, self._seconds, self._phases)

    def ended(self, kind: str, outcome: str, timing: Timing) -> None:
        """Count a request that is over."""
        self._ends.labels(kind, outcome).inc()
        self._seconds.labels(kind).observe(timing.ended - timing.accepted)
        for phase, seconds in timing.phases().items():
            self._phases.labels(kind, phase).observe(seconds)


class PassSeries(Series):
    """Passes and steps of one base model."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._seconds = histogram("pass_seconds", "Seconds of passes.", "model", "kind")
        self._ranks = histogram("pass_rank_seconds", "The ranks' own part.", "model", "kind")
        self._data = histogram("pass_data", "Data of passes.", "model", "kind", buckets=COUNTS)
        self._runs = histogram("pass_runs", "Runs in passes.", "model", "kind", buckets=COUNTS)
        self._tokens = counter("pass_tokens", "Tokens in passes.", "model", "kind")
        self._steps = counter("optimizer_steps", "Optimizer steps.", "model")
        super().__init__(
            self._seconds, self._ranks, self._data, self._runs, self._tokens, self._steps
        )

    def passed(
        self, kind: str, *, runs: int, data: int, tokens: int, seconds: float, ranks_s: float
    ) -> None:
        """Count a pass."""
        labels = (self._model, kind)
        self._seconds.labels(*labels).observe(seconds)
        self._ranks.labels(*labels).observe(ranks_s)
        self._data.labels(*labels).observe(data)
        self._runs.labels(*labels).observe(runs)
        self._tokens.labels(*labels).inc(tokens)

    def stepped(self) -> None:
        """Count an optimizer step."""
        self._steps.labels(self._model).inc()


class CommitSeries(Series):
    """What the database's writer does."""

    def __init__(self) -> None:
        self._seconds = histogram("commit_seconds", "Seconds of commits.")
        self._writes = histogram(
            "commit_writes", "Writes that were committed together.", buckets=COUNTS
        )
        super().__init__(self._seconds, self._writes)

    def committed(self, writes: int, seconds: float) -> None:
        """Count a commit."""
        self._seconds.observe(seconds)
        self._writes.observe(writes)


def merged(parts: Iterable[Iterable[Metric]]) -> Iterator[Metric]:
    """Return metrics with those of the same name as one: Prometheus wants a name once."""
    found: dict[str, Metric] = {}
    for part in parts:
        for metric in part:
            if metric.name in found:
                found[metric.name].samples.extend(metric.samples)
            else:
                found[metric.name] = metric
    yield from found.values()
