"""What projects have used, by day; and what keys have done."""

from collections.abc import Callable

from sqlalchemy import ColumnElement, Connection, and_, func, insert, select

from megatrain.service.store import tables
from megatrain.service.store.records import AuditEntry, Session, Used
from megatrain.service.store.rows import record, upsert, values
from megatrain.service.store.store import Change

_T, _HOURS, _AUDIT = tables.usage, tables.usage_hours, tables.audit
_SESSIONS = tables.sessions


def count(
    day: str, project: str, key_id: int, kind: str, tokens: int, num_requests: int = 1
) -> Change:
    """Count requests and their tokens."""

    def change(connection: Connection) -> None:
        new = {"day": day, "project": project, "key_id": key_id, "kind": kind}
        more = {"tokens": _T.c.tokens + tokens, "requests": _T.c.requests + num_requests}
        upsert(connection, _T, new | {"tokens": tokens, "requests": num_requests}, more)

    return change


def tokens_of(project: str, day: str) -> Callable[[Connection], int]:
    """Return the tokens that a project has used in a day."""
    query = select(func.coalesce(func.sum(_T.c.tokens), 0))
    query = query.where(_T.c.project == project, _T.c.day == day)
    return lambda connection: int(connection.execute(query).scalar_one())


def use(used: Used) -> Change:
    """Add tokens to those of an hour."""

    def change(connection: Connection) -> None:
        more = {"tokens": _HOURS.c.tokens + used.tokens}
        upsert(connection, _HOURS, values(used), more)

    return change


def by_hour(
    project: str, start: float, end: float, limit: int
) -> Callable[[Connection], list[Used]]:
    """Return what a project has used in the hours that began from `start` until before `end`:
    by hour, and the most first."""
    query = select(_HOURS).where(_between(project, start, end))
    query = query.order_by(_HOURS.c.hour, _HOURS.c.tokens.desc()).limit(limit)
    return lambda connection: [record(Used, row) for row in connection.execute(query).mappings()]


def sessions_by_hour(
    project: str, start: float, end: float
) -> Callable[[Connection], list[Session]]:
    """Return the project's sessions that have used anything in these hours, if still known."""
    used = select(_HOURS.c.session).where(_between(project, start, end))
    query = select(_SESSIONS).where(_SESSIONS.c.project == project, _SESSIONS.c.id.in_(used))
    return lambda connection: [record(Session, row) for row in connection.execute(query).mappings()]


def _between(project: str, start: float, end: float) -> ColumnElement[bool]:
    return and_(_HOURS.c.project == project, _HOURS.c.hour >= start, _HOURS.c.hour < end)


def audit(entry: AuditEntry) -> Change:
    """Keep what a key did."""

    def change(connection: Connection) -> None:
        connection.execute(insert(_AUDIT).values(**values(entry)))

    return change


def audit_page(project: str, limit: int, offset: int) -> Callable[[Connection], list[AuditEntry]]:
    """Return some of what keys of a project have done, the newest first."""
    query = select(_AUDIT).where(_AUDIT.c.project == project).order_by(_AUDIT.c.id.desc())
    query = query.limit(limit).offset(offset)
    return lambda connection: [
        record(AuditEntry, row) for row in connection.execute(query).mappings()
    ]
