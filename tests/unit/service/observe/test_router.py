"""Who may read metrics, and what is told of readiness to whom."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Gauge
from starlette.exceptions import HTTPException

from megatrain.errors import StateError
from megatrain.sampler.types import SamplerStatus
from megatrain.service.observe.health import Health
from megatrain.service.observe.router import make_router


class Store:
    def __init__(self) -> None:
        self.error: Exception | None = None
        self.looks = 0

    async def read(self, query):
        self.looks += 1
        if self.error is not None:
            raise self.error


class Deployment:
    def __init__(self) -> None:
        self.fleet = SimpleNamespace(is_ready=True, error="")
        self.status = SamplerStatus("none", True)

    @property
    def sampler(self):
        return SimpleNamespace(status=lambda: self.status)


@pytest.fixture
def hub():
    return SimpleNamespace(
        is_ready=True, is_draining=False, store=Store(), deployments={"m": Deployment()}
    )


@pytest.fixture
def ask(hub):
    registry = CollectorRegistry()
    Gauge("up", "x", registry=registry).set(1)

    async def authenticate(request, scope: str) -> None:
        if request.headers.get("x-api-key") != f"with {scope}":
            raise HTTPException(401)

    app = FastAPI()
    app.include_router(make_router(registry, Health(hub), authenticate))

    def ask(path: str, *, client="127.0.0.1", host="127.0.0.1:8000", **headers: str):
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app, client=(client, 5))
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as http:
                return await http.get(path, headers=headers)

        return asyncio.run(send())

    return ask


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:8000"])
def test_this_host_reads_metrics_without_a_key(ask, host):
    assert "up 1.0" in ask("/metrics", host=host).text


@pytest.mark.parametrize(
    "how",
    [
        {"client": "10.0.0.1"},
        {"host": "evil.example"},
        {"X-Forwarded-For": "10.0.0.1"},
        {"Via": "1.1 proxy"},
    ],
)
def test_others_need_a_key_with_the_scope(ask, how):
    assert ask("/metrics", **how).status_code == 401
    assert ask("/metrics", **how, **{"X-API-Key": "with metrics"}).status_code == 200


def test_the_process_answers_whatever_is_missing(ask, hub):
    hub.is_ready = False
    assert ask("/healthz").status_code == 200


def test_a_service_is_ready_when_all_of_it_is(ask):
    answer = ask("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready", "reasons": {}})


def break_start(hub):
    hub.is_ready = False
    return "service", "started"


def break_end(hub):
    hub.is_draining = True
    return "service", "ended"


def break_database(hub):
    hub.store.error = StateError("the database could not be read")
    return "database", "could not be read"


def break_ranks(hub):
    hub.deployments["m"].fleet = SimpleNamespace(is_ready=False, error="rank 1 is gone")
    return "m", "rank 1 is gone"


def break_sampler(hub):
    hub.deployments["m"].status = SamplerStatus("vllm", False, error="it has ended")
    return "m", "it has ended"


@pytest.mark.parametrize(
    "harm", [break_start, break_end, break_database, break_ranks, break_sampler]
)
def test_what_is_missing_is_told_to_this_host_alone(ask, hub, harm):
    name, reason = harm(hub)
    answer = ask("/readyz")
    assert answer.status_code == 503
    assert list(answer.json()["reasons"]) == [name]
    assert reason in answer.json()["reasons"][name]
    stranger = ask("/readyz", client="10.0.0.1")
    assert (stranger.status_code, stranger.json()) == (503, {"status": "not ready"})


def test_a_database_that_hangs_is_asked_once_by_many(hub, monkeypatch):
    monkeypatch.setattr("megatrain.service.observe.health.DATABASE_S", 0.01)

    async def look() -> tuple[list[dict[str, str]], int]:
        hanging = asyncio.Event()

        async def read(query):
            hub.store.looks += 1
            await hanging.wait()

        hub.store.read = read
        health = Health(hub)
        found = [await health.reasons() for _ in range(3)]
        hanging.set()
        await asyncio.sleep(0)
        return found, hub.store.looks

    found, looks = asyncio.run(look())
    assert all("has not answered" in each["database"] for each in found)
    assert looks == 1
