"""Metrics, status and spans of a driver: from made-up events, and from a driver with two ranks."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from megatrain.bus.beat import Beat
from megatrain.bus.commands import COMMANDS
from megatrain.bus.events import Event, Observers
from megatrain.bus.telemetry.beat_log import STEP_S, BeatLog
from megatrain.bus.telemetry.endpoint import Endpoint, serve_metrics
from megatrain.bus.telemetry.metrics import BusMetrics
from megatrain.bus.telemetry.recent import quantile
from megatrain.bus.telemetry.status import make_status
from megatrain.bus.telemetry.telemetry import Telemetry
from megatrain.bus.telemetry.traces import BusTraces
from megatrain.config.bus import BusConfig
from megatrain.errors import BusError

PHASES = {"validate": 0.5, "execute": 2.0}


class FakeDriver:
    """What telemetry asks of a driver, without ranks."""

    def __init__(self) -> None:
        self.config, self.observers = BusConfig(), Observers()
        self.supervisor = SimpleNamespace(num_restarts=1)
        self.welcome = SimpleNamespace(platform="cpu", mesh={"dp": 2})
        self.losses = ["rank 1 is gone"]
        self.num_pending, self.is_over = 5, False
        adapters = {"device": 2, "host": 1, "disk": 0, "a tier of tomorrow": 7}
        beats = [Beat(0, "here", 10, resident_bytes=100, adapters=adapters), Beat(1, "here", 11)]
        self.health: dict[str, Any] = {"beats": beats, "queued": 3}

    def tell(self, kind: Any, seq: int = 1, command: str = "Ping", **values: Any) -> None:
        self.observers.tell(Event(kind, seq, command, **values))


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def metrics(driver: FakeDriver) -> Iterator[BusMetrics]:
    found = BusMetrics(driver)
    yield found
    found.close()


@pytest.fixture
def endpoint(metrics: BusMetrics) -> Iterator[Endpoint]:
    found = serve_metrics(metrics)
    yield found
    found.close()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Return what Prometheus would read: values by name and the labels' values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(metrics: BusMetrics) -> dict[tuple[str, ...], float]:
    return samples(generate_latest(metrics.registry).decode())


def fetch(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return answer.read().decode()


def test_commands_are_counted_by_name_outcome_and_phase(driver, metrics):
    driver.tell("accepted", num_bytes=40)
    driver.tell("done", seconds=3.0, phases=PHASES, num_bytes=7)
    driver.tell("failed", seconds=1.0, num_bytes=9)
    driver.tell("cancelled")
    found = scraped(metrics)
    for outcome in ("done", "failed", "cancelled"):
        assert found["megatrain_commands_total", "Ping", outcome] == 1
    assert found["megatrain_sent_bytes_total", "Ping"] == 40
    assert found["megatrain_received_bytes_total", "Ping"] == 16
    for phase, seconds in {"queue": 0.5, **PHASES}.items():
        assert found["megatrain_command_phase_seconds_sum", "Ping", phase] == seconds
    assert found["megatrain_command_seconds_sum", "Ping", "done"] == 3.0
    assert found["megatrain_command_seconds_count", "Ping", "failed"] == 1


def test_a_scrape_reads_queues_ranks_and_adapters(driver, metrics):
    found = scraped(metrics)
    assert found["megatrain_commands_pending",] == 5
    assert found["megatrain_commands_queued_on_ranks",] == 3
    assert found["megatrain_restarts_left",] == 2
    assert found["megatrain_rank_resident_bytes", "0"] == 100
    assert found["megatrain_rank_silence_seconds", "1"] < 1
    tiers = {key[1]: value for key, value in found.items() if "adapters" in key[0]}
    assert tiers == {"device": 2, "host": 1, "disk": 0}
    driver.num_pending = 1
    assert scraped(metrics)["megatrain_commands_queued_on_ranks",] == 1, (
        "what is answered waits not"
    )


def test_losses_and_recoveries_are_counted(driver, metrics):
    assert make_status(metrics)["state"] == "running"
    driver.tell("lost", 0, "", text="rank 1 is gone")
    assert make_status(metrics)["state"] == "recovering"
    driver.tell("recovered", 0, "", seconds=2.5)
    driver.tell("snapshot", 9, "")
    found = scraped(metrics)
    assert found["megatrain_losses_total",] == found["megatrain_snapshots_total",] == 1
    assert found["megatrain_recovery_seconds_sum",] == 2.5
    assert make_status(metrics)["state"] == "running"


def test_series_do_not_grow_with_commands(driver, metrics):
    for seq in range(200):
        driver.tell("accepted", seq, f"Strange{seq}")
        driver.tell("done", seq, f"Strange{seq}", phases=PHASES, seconds=3.0)
    few = len(scraped(metrics))
    for seq, name in enumerate(COMMANDS):
        driver.tell("done", seq, name, phases=PHASES, seconds=3.0)
    labels = {key[1] for key in scraped(metrics) if key[0] == "megatrain_commands_total"}
    assert labels == {"other", *COMMANDS}
    assert few < 200


def test_a_driver_without_ranks_yet_can_be_scraped(driver, metrics):
    for name in ("health", "welcome", "losses", "supervisor"):
        delattr(driver, name)
    assert scraped(metrics)["megatrain_restarts_left",] == 3
    assert make_status(metrics)["state"] == "starting"


def test_closed_metrics_count_no_longer(driver, metrics):
    other = BusMetrics(driver)
    other.close()
    driver.tell("cancelled")
    assert ("megatrain_commands_total", "Ping", "cancelled") not in scraped(other)
    assert ("megatrain_commands_total", "Ping", "cancelled") in scraped(metrics)


def beats(tokens: int, *, pid: int = 1, count: int = 1) -> list[Beat]:
    return [Beat(0, "here", pid, tokens=tokens, count=count)]


def test_tokens_grow_also_when_ranks_start_anew():
    log = BeatLog(list)
    log.note(beats(1000), 0.0)
    assert log.tokens == 0, "they were passes of another driver"
    log.note(beats(1600), 2.0)
    log.note(beats(700, pid=2), 4.0)
    assert log.tokens == 1300
    assert log.tokens_per_second() == 1300 / 4
    log.note([], 6.0)
    assert log.tokens == 1300


def test_the_history_of_tokens_is_in_even_steps():
    log = BeatLog(list)
    for second in range(21):
        log.note(beats(100 * max(0, second - 10)), float(second))
    assert log.history() == [0, 0, 100, 100]
    assert 20 / len(log.history()) == STEP_S


def test_a_rank_is_silent_until_its_count_grows():
    log = BeatLog(list)
    log.note(beats(0, count=4), 10.0)
    log.note(beats(0, count=4), 13.0)
    assert log.silence(0, 14.0) == 4.0
    log.note(beats(0, count=5), 14.5)
    assert log.silence(0, 15.0) == 0.5


def test_status_has_rates_and_quantiles(driver, metrics):
    for milliseconds in range(1, 101):
        driver.tell("done", milliseconds, seconds=milliseconds / 1000)
    driver.tell("failed", 101)
    (row,) = make_status(metrics)["commands"]
    assert (row["name"], row["done"], row["failed"]) == ("Ping", 100, 1)
    assert (row["p50_s"], row["p95_s"]) == (0.051, 0.096)
    assert row["per_second"] > 0
    assert quantile([], 0.5) is None


def test_the_endpoint_serves_this_host_alone(endpoint):
    assert endpoint.url.startswith("http://127.0.0.1:")
    assert ("megatrain_commands_pending",) in samples(fetch(f"{endpoint.url}/metrics"))
    assert json.loads(fetch(f"{endpoint.url}/status"))["queue"] == {"driver": 5, "ranks": 3}
    for path, headers, code in (
        ("/", {}, 404),
        ("/status", {"Host": "evil.example:80"}, 403),  # a name that was made to point here
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch(endpoint.url + path, **headers)
        assert caught.value.code == code
        caught.value.close()


def test_a_taken_port_is_refused_and_a_closed_one_is_free(metrics):
    first = serve_metrics(metrics)
    port = int(first.url.rpartition(":")[2])
    with pytest.raises(BusError, match=rf"127.0.0.1:{port}.*\nhint: metrics_port=0"):
        serve_metrics(metrics, port=port)
    first.close()
    serve_metrics(metrics, port=port).close()
    with pytest.raises(BusError, match=r"192\.0\.2\.1"):
        serve_metrics(metrics, host="192.0.2.1")


class Spans:
    """Spans that were exported."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def named(self, name: str) -> Any:
        """Return the only span of a name."""
        (found,) = [each for each in self._exporter.get_finished_spans() if each.name == name]
        return found

    def __len__(self) -> int:
        return len(self._exporter.get_finished_spans())


@pytest.fixture
def spans(driver: FakeDriver) -> Iterator[Spans]:
    found = Spans()
    traces = BusTraces(driver, found.provider)
    yield found
    traces.close()


def test_a_command_is_a_child_of_the_span_it_was_submitted_in(driver, spans):
    with spans.provider.get_tracer("script").start_as_current_span("step") as step:
        driver.tell("accepted", 4, num_bytes=40, at=100.0)
    driver.tell("done", 4, at=103.0, seconds=3.0, phases=PHASES, num_bytes=7)
    ping = spans.named("Ping")
    assert ping.parent.span_id == step.get_span_context().span_id
    assert dict(ping.attributes) == {
        "megatrain.seq": 4,
        "megatrain.outcome": "done",
        "megatrain.sent_bytes": 40,
        "megatrain.received_bytes": 7,
    }
    assert (ping.start_time, ping.end_time) == (100 * 10**9, 103 * 10**9)
    at = ping.start_time
    for name, seconds in {"queue": 0.5, **PHASES}.items():
        phase = spans.named(name)
        assert phase.parent.span_id == ping.context.span_id
        assert (phase.start_time, phase.end_time) == (at, at + int(seconds * 1e9))
        at = phase.end_time


def test_a_failure_is_an_error_with_its_text(driver, spans):
    driver.tell("accepted")
    driver.tell("failed", text="no such adapter")
    assert spans.named("Ping").status.description == "no such adapter"
    assert len(spans) == 1, "ranks told no phases"


def test_a_command_of_a_driver_before_has_a_span(driver, spans):
    driver.tell("done", 8, at=103.0, seconds=3.0)
    assert spans.named("Ping").start_time == 100 * 10**9


def test_a_recovery_has_a_span(driver, spans):
    driver.tell("lost", 0, "", text="rank 1 is gone")
    driver.tell("recovered", 0, "", at=50.0, seconds=2.0)
    span = spans.named("recovered")
    assert dict(span.attributes) == {"megatrain.lost": "rank 1 is gone", "megatrain.restarts": 1}
    assert (span.start_time, span.end_time) == (48 * 10**9, 50 * 10**9)


@pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.sdk"])
def test_traces_without_opentelemetry_name_the_package(missing):
    code = (
        "import importlib.util, sys\n"
        "from types import SimpleNamespace\n"
        "from megatrain.bus.telemetry.telemetry import Telemetry\n"
        f"if {missing!r} == 'opentelemetry': sys.modules['opentelemetry'] = None\n"
        "importlib.util.find_spec = lambda name: None\n"
        "Telemetry(SimpleNamespace()).open(metrics_port=None, traces=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "PlatformError: traces=True needs OpenTelemetry" in done.stderr
    assert "hint: pip install 'megatrain[otel]'" in done.stderr


def test_telemetry_needs_no_torch_and_imports_nothing_unless_it_is_asked_for():
    code = (
        "import sys\n"
        "import megatrain.bus.telemetry.telemetry\n"
        "assert not {'prometheus_client', 'opentelemetry'} & sys.modules.keys()\n"
        "import megatrain.bus.telemetry.endpoint, megatrain.bus.telemetry.traces\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_driver_with_two_ranks_is_seen_in_all_three_ways(monkeypatch):
    import megatrain
    from megatrain.api.session import current_remote

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    megatrain.initialize(mode="driver", nproc_per_node=2, fork_ranks=True, platform="cpu")
    try:
        driver = current_remote().driver(None)
        telemetry, spans = Telemetry(driver), Spans()
        traces = BusTraces(driver, spans.provider)
        telemetry.open(metrics_port=0, traces=False)
        driver.ping()
        url = telemetry.metrics_url
        found = wait_for(url, lambda found: ("megatrain_rank_resident_bytes", "1") in found)
        assert found["megatrain_commands_total", "Ping", "done"] == 1
        assert found["megatrain_rank_resident_bytes", "1"] > 1 << 20
        assert spans.named("execute").parent.span_id == spans.named("Ping").context.span_id
        for arguments in (["--pid", str(os.getpid())], [f"{url}/metrics"]):
            shown = subprocess.run(
                [sys.executable, "-m", "megatrain", "top", "--once", *arguments],
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            )
            assert "2 rank(s) on 1 host(s), cpu · dp=2" in shown.stdout
            assert all(str(pid) in shown.stdout for pid in driver.welcome.pids)
        os.kill(driver.welcome.pids[1], signal.SIGKILL)
        found = wait_for(url, lambda found: found["megatrain_recovery_seconds_count",] == 1)
        assert found["megatrain_losses_total",] == 1
        assert driver.losses[0].startswith(spans.named("recovered").attributes["megatrain.lost"])
        traces.close()
        telemetry.close()
        with pytest.raises(urllib.error.URLError):
            fetch(f"{url}/metrics")
    finally:
        megatrain.shutdown()


def wait_for(url: str, is_so: Any) -> dict[tuple[str, ...], float]:
    """Scrape until something is so."""
    limit = time.monotonic() + 60
    while True:
        found = samples(fetch(f"{url}/metrics"))
        if is_so(found):
            return found
        assert time.monotonic() < limit, found
        time.sleep(0.2)
