"""Bodies of all endpoints have a cap."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel

from megatrain.service.wire.body_cap import BodyCap


class _Body(BaseModel):
    text: str


def _app() -> BodyCap:
    app = FastAPI()

    @app.post("/api/small")
    async def small(body: _Body) -> int:
        return len(body.text)

    @app.post("/api/large")
    async def large(request: Request) -> int:
        return len(await request.body())

    return BodyCap(app, larger={"/large": 10_000}, max_bytes=1000)


def _post(path: str, **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, **options)

    return asyncio.run(run())


async def _pieces(size: int) -> AsyncIterator[bytes]:
    """Yield a body whose length is not announced."""
    for _ in range(size // 100):
        yield b"x" * 100


def test_bodies_within_their_cap_pass():
    assert _post("/api/small", json={"text": "abc"}).json() == 3
    assert _post("/api/large", content=b"x" * 5000).json() == 5000
    assert _post("/api/large", content=_pieces(10_000)).json() == 10_000


@pytest.mark.parametrize(
    ("path", "size"), [("/api/small", 1100), ("/api/large", 10_100), ("/nowhere", 1100)]
)
def test_bodies_over_their_cap_are_refused_by_their_length(path, size):
    answer = _post(path, content=b"x" * size)
    assert answer.status_code == 413
    assert "more than" in answer.json()["detail"]


@pytest.mark.parametrize(("path", "size"), [("/api/small", 1100), ("/api/large", 10_100)])
def test_bodies_that_do_not_say_their_length_are_counted(path, size):
    headers = {"content-type": "application/json"}
    assert _post(path, content=_pieces(size), headers=headers).status_code == 413
