"""Clients' sessions: alive while their heartbeats come."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from megatrain.config.service import Limits, Times
from megatrain.errors import BusyError, NotFoundError
from megatrain.service.auth.principal import Principal
from megatrain.service.store import sessions
from megatrain.service.store.records import Session
from megatrain.service.store.store import Store

TOUCH_EVERY_S = 60.0
"""How often a heartbeat is written down."""


class Sessions:
    """The sessions that are alive."""

    def __init__(
        self,
        store: Store,
        limits: Limits,
        times: Times,
        over: Callable[[str], Awaitable[None]],
    ) -> None:
        """`over` hears the id of every session that ends."""
        self._store, self._limits, self._times, self._over = store, limits, times, over
        self._alive: dict[str, Session] = {}
        self._seen: dict[str, float] = {}
        self._written: dict[str, float] = {}

    def restore(self, records: list[Session]) -> None:
        """Take up sessions of an earlier process; their clients get as long as ever to be heard."""
        for record in records:
            self._alive[record.id] = record
            self._seen[record.id] = time.monotonic()

    async def create(self, principal: Principal, content: dict[str, Any]) -> Session:
        """Begin a session.  Raises BusyError where a project has too many."""
        mine = sum(each.project == principal.project for each in self._alive.values())
        if mine >= self._limits.max_sessions:
            raise BusyError(
                f"this project has {mine} sessions that are alive",
                hint="finish some; those without a heartbeat end by themselves",
                retry_after_s=30.0,
            )
        now = time.time()
        record = Session(
            id=str(uuid.uuid4()),
            project=principal.project,
            key_id=principal.key_id,
            tags=tuple(content.get("tags") or ()),
            user_metadata=content.get("user_metadata") or {},
            display_name=content.get("display_name"),
            sdk_version=content.get("sdk_version") or "",
            created=now,
            last_seen=now,
        )
        await self._store.write(sessions.add(record))
        self._alive[record.id] = record
        self._seen[record.id] = time.monotonic()
        return record

    def alive(self, project: str, session_id: str) -> Session:
        """Return a session of a project that is alive.  Raises NotFoundError."""
        record = self._alive.get(session_id)
        if record is None or record.project != project:
            raise NotFoundError(f"there is no session {session_id!r} that is alive")
        self._seen[session_id] = time.monotonic()
        return record

    def is_alive(self, session_id: str) -> bool:
        """Tell whether a session goes on."""
        return session_id in self._alive

    async def heartbeat(self, project: str, session_id: str) -> None:
        """Note that a session is alive.  Raises NotFoundError for one that is over."""
        self.alive(project, session_id)
        now = time.monotonic()
        if now - self._written.get(session_id, 0.0) > TOUCH_EVERY_S:
            self._written[session_id] = now
            await self._store.write(sessions.touch(session_id, time.time()))

    async def finish(self, project: str, session_id: str, status: str, detail: str | None) -> None:
        """End a session as its client says.  Nothing happens to one that is over."""
        record = self._alive.get(session_id)
        if record is None or record.project != project:
            return
        await self._end(record, status, detail)

    async def expire(self) -> None:
        """End sessions that were not heard of for too long."""
        now = time.monotonic()
        silent = [
            record
            for key, record in self._alive.items()
            if now - self._seen[key] > self._times.session_s
        ]
        for record in silent:
            await self._end(record, "expired", None)

    async def _end(self, record: Session, status: str, detail: str | None) -> None:
        self._alive.pop(record.id, None)
        self._seen.pop(record.id, None)
        self._written.pop(record.id, None)
        await self._store.write_surely(sessions.finish(record.id, status, detail, time.time()))
        await asyncio.shield(self._over(record.id))
