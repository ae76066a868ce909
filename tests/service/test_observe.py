"""What an operator sees of a real service, and that its end loses nothing that was accepted."""

import contextlib
import json
import os
import signal
import subprocess
import time
import warnings

import httpx
import pytest
import tinker
from tinker import types

from tests.service.sdk_clients import datum
from tests.service.server import NAME, Server

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings("ignore::FutureWarning")]

TRACE = "0af7651916cd43dd8448eb211c80319c"
STEP = types.AdamParams(learning_rate=1e-3)


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoints):
    """A service that writes its log as JSON, and its spans between the lines."""
    folder = tmp_path_factory.mktemp("observed")
    server = Server(checkpoints("qwen3"), folder, "--sampler", "none", "--log-format", "json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_TRACES_EXPORTER", "console")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        server.start()
    yield server
    assert server.stop() == 0


def client(server: Server) -> tinker.ServiceClient:
    warnings.simplefilter("ignore")
    return tinker.ServiceClient(base_url=server.url, api_key=server.key)


@pytest.fixture(scope="module")
def trained(server):
    """The run of a client that has made two steps."""
    training = client(server).create_lora_training_client(base_model=NAME, rank=4).result()
    for seed in range(2):
        passed = training.forward_backward([datum(seed), datum(9)], "cross_entropy")
        stepped = training.optim_step(STEP)
        passed.result()
        stepped.result()
    return training.get_info().model_id


def metric(server: Server, name: str, *labels: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    found = [
        float(line.rpartition(" ")[2])
        for line in lines
        if line.split("{")[0].split(" ")[0] == f"megatrain_service_{name}"
        and all(f'"{label}"' in line for label in labels)
    ]
    assert found, f"{name} {labels}"
    return sum(found)


def eventually(what, seconds: float = 10.0) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_metrics_tell_what_was_done(server, trained):
    eventually(lambda: metric(server, "requests_total", "optim_step", "done") == 2)
    assert metric(server, "requests_total", "forward_backward", "done") == 2
    assert metric(server, "pass_tokens_total", NAME, "forward_backward") == 4 * 12
    assert metric(server, "pass_data_sum", NAME, "forward_backward") == 4
    assert metric(server, "optimizer_steps_total", NAME) == 2
    assert metric(server, "ranks_alive", NAME) == metric(server, "ranks", NAME) == 1
    assert 0 < metric(server, "pass_rank_seconds_sum", NAME) < metric(server, "pass_seconds_sum")
    assert metric(server, "request_phase_seconds_count", "forward_backward", "ranks") == 2
    assert metric(server, "commit_seconds_count") > 4
    assert metric(server, "http_requests_total", "/api/v1/optim_step", "200") == 2
    assert metric(server, "runs", NAME) >= 1
    assert metric(server, "requests_queued", NAME) == 0
    assert metric(server, "sampler_ready", "trainer") == 1
    assert metric(server, "process_resident_bytes") > 1e7
    assert metric(server, "rank_resident_bytes", NAME, "0") > 1e7
    assert metric(server, "ready") == 1


def test_labels_name_no_tenant(server, trained):
    text = httpx.get(f"{server.url}/metrics").text
    for name in (trained, trained.partition(":")[0], "default", server.key):
        assert name not in text


def test_metrics_need_a_key_of_their_scope_beyond_this_host(server):
    away = {"X-Forwarded-For": "203.0.113.5"}
    assert httpx.get(f"{server.url}/metrics", headers=away).status_code == 401
    reader = server.create_key("--project", "other", "--scopes", "train")
    denied = httpx.get(f"{server.url}/metrics", headers={**away, "X-API-Key": reader})
    assert denied.status_code == 403
    scraper = server.create_key("--project", "other", "--scopes", "metrics")
    for key in (scraper, server.key):
        allowed = httpx.get(f"{server.url}/metrics", headers={**away, "X-API-Key": key})
        assert allowed.status_code == 200


def test_a_service_that_works_is_ready(server):
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/api/v1/healthz").json() == {"status": "ok"}
    answer = httpx.get(f"{server.url}/readyz")
    assert (answer.status_code, answer.json()["reasons"]) == (200, {})


def lines(server: Server) -> list[dict]:
    found = []
    for line in server.log.splitlines():
        if line.startswith('{"time"'):
            found.append(json.loads(line))
    return found


def test_an_error_is_found_in_the_log_by_its_id(server):
    body = {"model_id": "nobodys"}
    with server.http() as http:
        answer = http.post("/get_info", json=body, headers={"X-Request-ID": "find-me"})
    assert answer.status_code == 404
    assert answer.headers["x-request-id"] == answer.json()["x_request_id"] == "find-me"
    eventually(lambda: any(each.get("request") == "find-me" for each in lines(server)))
    (line,) = [each for each in lines(server) if each.get("request") == "find-me"]
    assert (line["status"], line["path"]) == (404, "/api/v1/get_info")
    assert server.key not in "".join(map(json.dumps, lines(server)))


def test_a_request_leaves_spans_under_its_clients_own(server, trained):
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    with server.http() as http:
        body = {"model_id": trained, "adam_params": {"learning_rate": 1e-3}, "type": "optim_step"}
        accepted = http.post("/optim_step", json=body, headers=headers).json()
        http.post("/retrieve_future", json={"request_id": accepted["request_id"]})

    def names() -> set[str]:
        parts = server.log.split('\n{\n    "name": "')[1:]
        return {part.partition('"')[0] for part in parts if f'"0x{TRACE}"' in part}

    expected = {"POST /api/v1/optim_step", "optim_step", "commit", "queue", "bus", "ranks"}
    eventually(lambda: expected <= names())


class Ending(Server):
    """A service that a test ends by itself, and starts again."""

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The service's process."""
        assert self._process is not None
        return self._process


@pytest.fixture
def ending(tmp_path, checkpoints):
    server = Ending(checkpoints("qwen3"), tmp_path / "ending", "--sampler", "none")
    server.start()
    yield server
    server.stop()


DATA = [datum(seed, 128) for seed in range(24)]
MUCH = [datum(seed, 256) for seed in range(32)]
"""Takes long enough for a second signal to come while it runs."""


def losses(server: Server, data: list, steps: int, meanwhile) -> list[float]:
    """Return the losses of some steps that are all sent before `meanwhile` is done."""
    training = client(server).create_lora_training_client(base_model=NAME, rank=4, seed=1).result()
    futures = []
    for _ in range(steps):
        futures += [training.forward_backward(data, "cross_entropy"), training.optim_step(STEP)]
    eventually(lambda: metric(server, "futures_open") >= steps, 60)
    meanwhile()
    return [each.result(timeout=200).metrics["loss:sum"] for each in futures[::2]]


@pytest.mark.slow
def test_what_was_accepted_before_the_end_is_done_after_the_next_start(ending):
    expected = losses(ending, DATA, 4, lambda: None)
    seen = []

    def end_and_start() -> None:
        ending.process.send_signal(signal.SIGTERM)
        eventually(lambda: "a second signal ends at once" in ending.log)
        while ending.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                seen.append(httpx.get(f"{ending.url}/readyz", timeout=5).status_code)
            time.sleep(0.02)
        assert ending.process.returncode == 0
        ending.start()

    assert losses(ending, DATA, 4, end_and_start) == pytest.approx(expected, rel=1e-6)
    assert seen
    assert set(seen) == {503}
    assert "heartbeat: 410" not in ending.log  # a client would take its session for over


@pytest.mark.slow
def test_a_second_signal_ends_everything_at_once(ending):
    group = os.getpgid(ending.process.pid)

    def end() -> None:
        ending.process.send_signal(signal.SIGTERM)
        eventually(lambda: "a second signal ends at once" in ending.log)
        ending.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert ending.process.wait(10) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 5
        eventually(lambda: not is_alive(group), 30)
        ending.start()

    assert len(losses(ending, MUCH, 2, end)) == 2


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
