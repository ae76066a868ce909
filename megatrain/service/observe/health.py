"""Whether the service can be used, and if not, why."""

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from sqlalchemy import text

from megatrain.errors import MegatrainError

DATABASE_S = 2.0
"""Seconds in which the database must answer."""


class Served(Protocol):
    """One base model: `Deployment` has it."""

    fleet: Any
    sampler: Any


class Alive(Protocol):
    """The service: `Hub` has it."""

    is_ready: bool
    is_draining: bool
    store: Any
    deployments: Any


class Health:
    """Looks whenever it is asked."""

    def __init__(self, hub: Alive) -> None:
        self._hub = hub
        self._looking: asyncio.Task[str] | None = None

    async def reasons(self) -> dict[str, str]:
        """Return why the service is not ready: of itself, the database, each model; {} if it is."""
        hub, found = self._hub, {}
        if hub.is_draining:
            found["service"] = "it is being ended"
        elif not hub.is_ready:
            found["service"] = "it is being started"
        if said := await self._database():
            found["database"] = said
        return found | (self.models() if hub.is_ready else {})

    def models(self) -> dict[str, str]:
        """Return, by model, what keeps it from being used."""
        served: Mapping[str, Served] = self._hub.deployments
        found = {}
        for name, each in served.items():
            status = each.sampler.status()
            if not each.fleet.is_ready:
                found[name] = each.fleet.error or "its ranks are not there"
            elif not status.ready:
                found[name] = status.error or "its sampler is being started"
        return found

    async def _database(self) -> str:
        # One look at a time: while the database is away, looks would fill the threads that wait.
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._look())
        try:
            return await asyncio.wait_for(asyncio.shield(self._looking), DATABASE_S)
        except TimeoutError:
            return f"it has not answered for {DATABASE_S:g} s"

    async def _look(self) -> str:
        try:
            await self._hub.store.read(lambda connection: connection.execute(text("SELECT 1")))
        except MegatrainError as error:
            return error.message
        return ""
