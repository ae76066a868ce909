"""A service without ranks: its store, files and keys, and the application on top."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from megatrain.config.service import ServedModel, ServiceConfig
from megatrain.service.app import create_app
from megatrain.service.auth.key import new_key
from megatrain.service.hub import Hub
from megatrain.service.store import keys

Check = Callable[[Hub, httpx.AsyncClient], Awaitable[None]]


async def key_of(hub: Hub, project: str, *scopes: str) -> dict[str, str]:
    """Return headers with a new key of a project."""
    key, record = new_key(project, f"{project}-laptop", scopes or ("train", "sample"))
    await hub.store.write(keys.add(record))
    return {"x-api-key": key}


@pytest.fixture
def with_service(tmp_path: Path) -> Callable[[Check], None]:
    """Run a check with a service that has been opened, and a client of it."""

    async def run(check: Check) -> None:
        hub = Hub(ServiceConfig(models=(ServedModel(name="base", path="none"),), data=tmp_path))
        await hub.open()
        hub.is_ready = True  # with no model at all
        transport = httpx.ASGITransport(create_app(hub))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await check(hub, client)
        await hub.close()

    return lambda check: asyncio.run(run(check))
