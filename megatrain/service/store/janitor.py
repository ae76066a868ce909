"""Lets go what is kept for a while: results, checkpoints with an end, records, curves, logs."""

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sqlalchemy import Connection, Delete, Select, delete, exists, select

from megatrain.errors import MegatrainError
from megatrain.service.store import checkpoints, tables, writers
from megatrain.service.store.records import Checkpoint
from megatrain.service.store.store import Store

logger = logging.getLogger(__name__)

DAY_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How long things are kept, in seconds."""

    result_s: float = 3600.0
    """A result, after it was made."""
    session_s: float = 90 * DAY_S
    """A session that is over, its samplers, and its runs without checkpoints, with their curves."""
    audit_s: float = 365 * DAY_S
    """What was done."""
    usage_s: float = 730 * DAY_S
    """What was used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """How many of each went."""

    results: int = 0
    checkpoints: int = 0
    checkpoints_left: int = 0
    """Of those whose time is over, because their files could not be deleted; the next pass tries
    again."""
    sessions: int = 0
    runs: int = 0
    audit: int = 0


async def sweep(
    store: Store,
    keep: Keep,
    now: float,
    delete_checkpoint: Callable[[Checkpoint], Awaitable[None]],
) -> Swept:
    """Delete what is over at `now`; return how much it was.

    `delete_checkpoint` deletes a checkpoint's row and files; one that fails is left for the next
    pass, and the others go.
    """
    gone, left = await _sweep_checkpoints(store, now, delete_checkpoint)
    counts: dict[str, int] = {}

    def change(connection: Connection) -> None:
        before = now - keep.session_s
        counts["results"] = _deleted(connection, _results(now - keep.result_s))
        _deleted(connection, _curves(before))
        counts["runs"] = _deleted(connection, _runs(before))
        _deleted(connection, _samplers(before))
        counts["sessions"] = _deleted(connection, _sessions(before))
        counts["audit"] = _deleted(connection, _audit(now - keep.audit_s))
        _deleted(connection, _usage(now - keep.usage_s))
        _deleted(connection, _usage_by_hour(now - keep.usage_s))
        writers.forget(connection, before)

    await store.write(change)
    return Swept(checkpoints=gone, checkpoints_left=left, **counts)


async def _sweep_checkpoints(
    store: Store, now: float, delete_checkpoint: Callable[[Checkpoint], Awaitable[None]]
) -> tuple[int, int]:
    gone = left = 0
    for record in await store.read(checkpoints.expired(now)):
        try:
            await delete_checkpoint(record)
        except (MegatrainError, OSError) as error:
            logger.warning("%s has expired, and could not be deleted: %s", record.path, error)
            left += 1
        else:
            gone += 1
    return gone, left


def _deleted(connection: Connection, statement: Delete) -> int:
    return connection.execute(statement).rowcount


def _results(before: float) -> Delete:
    table = tables.requests
    return delete(table).where(table.c.state != "queued", table.c.finished < before)


def _runs(before: float) -> Delete:
    """Delete runs of sessions that are over, unless a checkpoint was made of them."""
    table = tables.runs
    return delete(table).where(table.c.id.in_(_old_runs(before)))


def _curves(before: float) -> Delete:
    table = tables.points
    return delete(table).where(table.c.run.in_(_old_runs(before)))


def _old_runs(before: float) -> Select[tuple[str]]:
    run, checkpoint = tables.runs, tables.checkpoints
    has_one = exists().where(checkpoint.c.run == run.c.id)
    return select(run.c.id).where(
        run.c.state.in_(["released", "failed"]), run.c.last_request < before, ~has_one
    )


def _samplers(before: float) -> Delete:
    table, session = tables.samplers, tables.sessions
    over = select(session.c.id).where(session.c.status != "active", session.c.last_seen < before)
    return delete(table).where(table.c.session.in_(over))


def _sessions(before: float) -> Delete:
    """Delete sessions that are over, unless a run is left of them."""
    table, run = tables.sessions, tables.runs
    has_run = exists().where(run.c.session == table.c.id)
    return delete(table).where(table.c.status != "active", table.c.last_seen < before, ~has_run)


def _audit(before: float) -> Delete:
    return delete(tables.audit).where(tables.audit.c.time < before)


def _usage(before: float) -> Delete:
    day = time.strftime("%Y-%m-%d", time.gmtime(before))
    return delete(tables.usage).where(tables.usage.c.day < day)


def _usage_by_hour(before: float) -> Delete:
    return delete(tables.usage_hours).where(tables.usage_hours.c.hour < before)
