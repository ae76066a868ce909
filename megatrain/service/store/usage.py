"""What projects have used, by day; and what keys have done."""

from collections.abc import Callable

from sqlalchemy import Connection, func, insert, select

from megatrain.service.store import tables
from megatrain.service.store.records import AuditEntry
from megatrain.service.store.rows import record, upsert, values
from megatrain.service.store.store import Change

_T, _AUDIT = tables.usage, tables.audit


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
