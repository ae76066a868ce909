"""Every answer has an id, is counted by its route, and what nobody catches is an answer too."""

import asyncio

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.responses import JSONResponse

from megatrain.service.observe.middleware import REQUEST_ID, Observed
from megatrain.service.observe.note import current
from megatrain.service.observe.series import HttpSeries


@pytest.fixture
def series() -> HttpSeries:
    return HttpSeries()


@pytest.fixture
def ask(series):
    app = FastAPI()

    @app.get("/things/{name}")
    async def thing(name: str) -> dict[str, str]:
        return {"seen": current().request}

    @app.get("/broken")
    async def broken() -> None:
        raise ValueError("tml-secretsecret")

    def fail(path: str, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": path, "of": current().request}, 500)

    router = APIRouter()

    @router.get("/under/{name}")
    async def under(name: str) -> None: ...

    app.include_router(router, prefix="/api")
    app.add_middleware(Observed, series=series, tracing=None, fail=fail, prefix="/api")

    def ask(path: str, method: str = "GET", **headers: str) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, headers=headers)

        return asyncio.run(send())

    return ask


def counted(series: HttpSeries) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels.values()): sample.value
        for metric in series.collect()
        for sample in metric.samples
        if sample.name.endswith("http_requests_total")
    }


def test_an_id_is_taken_over_and_seen_by_who_serves(ask):
    answer = ask("/things/a", **{REQUEST_ID: "my-request:1"})
    assert answer.headers[REQUEST_ID] == "my-request:1"
    assert answer.json() == {"seen": "my-request:1"}


@pytest.mark.parametrize("given", ["", "two words", "a" * 129, "a\tb", b"\xe9"])
def test_an_id_that_is_none_is_replaced(ask, given):
    answer = ask("/things/a", **{REQUEST_ID: given})
    assert answer.headers[REQUEST_ID] != given
    assert len(answer.headers[REQUEST_ID]) == 32


def test_requests_are_counted_by_route_whatever_they_name(ask, series):
    for name in ("a", "b", "c"):
        ask(f"/things/{name}")
    ask("/things/a", "POST")
    ask("/api/under/a")
    ask("/nowhere/1")
    ask("/nowhere/2", "BREW")
    assert counted(series) == {
        ("/things/{name}", "GET", "200"): 3,
        ("/things/{name}", "POST", "405"): 1,
        ("/api/under/{name}", "GET", "200"): 1,
        ("other", "GET", "404"): 1,
        ("other", "other", "404"): 1,
    }


def test_what_nobody_catches_is_an_answer_with_an_id(ask, series):
    answer = ask("/broken", **{REQUEST_ID: "r"})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "/broken", "of": "r"}
    assert answer.headers[REQUEST_ID] == "r"
    assert counted(series) == {("/broken", "GET", "500"): 1}
