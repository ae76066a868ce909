"""Sessions."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, and_, insert, or_, select, update

from megatrain.service.store import tables
from megatrain.service.store.records import Session
from megatrain.service.store.rows import first, record, values
from megatrain.service.store.store import Change

_T = tables.sessions


def add(session: Session) -> Change:
    """Keep a session."""

    def change(connection: Connection) -> None:
        connection.execute(insert(_T).values(**values(session)))

    return change


def touch(session_id: str, when: float) -> Change:
    """Note that a session was heard of."""

    def change(connection: Connection) -> None:
        connection.execute(update(_T).where(_T.c.id == session_id).values(last_seen=when))

    return change


def finish(session_id: str, status: str, detail: str | None, when: float) -> Change:
    """Note how a session has ended."""

    def change(connection: Connection) -> None:
        statement = update(_T).where(_T.c.id == session_id, _T.c.status == "active")
        connection.execute(statement.values(status=status, detail=detail, last_seen=when))

    return change


def get(project: str, session_id: str) -> Callable[[Connection], Session | None]:
    """Return a session of a project."""
    query = select(_T).where(_T.c.id == session_id, _T.c.project == project)
    return lambda connection: first(Session, connection.execute(query).mappings())


def active() -> Callable[[Connection], list[Session]]:
    """Return the sessions of all projects that are not over."""
    query = select(_T).where(_T.c.status == "active")
    return lambda connection: [record(Session, row) for row in connection.execute(query).mappings()]


def list_page(project: str, limit: int, offset: int) -> Callable[[Connection], list[Session]]:
    """Return some sessions of a project, the newest first."""
    query = select(_T).where(_T.c.project == project).order_by(_T.c.created.desc(), _T.c.id)
    query = query.limit(limit).offset(offset)
    return lambda connection: [record(Session, row) for row in connection.execute(query).mappings()]


def search(
    project: str,
    *,
    session_id: str | None = None,
    display_name: str | None = None,
    statuses: list[str] | None = None,
    before: tuple[float, str] | None = None,
    limit: int = 50,
) -> Callable[[Connection], list[Session]]:
    """Return sessions of a project, the newest first, from one (created, id) on."""
    conditions: list[Any] = [_T.c.project == project]
    if session_id is not None:
        conditions.append(_T.c.id == session_id)
    if display_name is not None:
        conditions.append(_T.c.display_name == display_name)
    if statuses:
        conditions.append(_T.c.status.in_(statuses))
    if before is not None:
        same = and_(_T.c.created == before[0], _T.c.id > before[1])
        conditions.append(or_(_T.c.created < before[0], same))
    query = select(_T).where(*conditions).order_by(_T.c.created.desc(), _T.c.id).limit(limit)
    return lambda connection: [record(Session, row) for row in connection.execute(query).mappings()]
