"""Checkpoints."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, func, or_, select, update
from sqlalchemy import delete as delete_rows

from megatrain.service.store import tables
from megatrain.service.store.records import Checkpoint
from megatrain.service.store.rows import first, record, upsert, values
from megatrain.service.store.store import Change

_T = tables.checkpoints


def put(checkpoint: Checkpoint) -> Change:
    """Keep a checkpoint, in place of one of the same path."""

    def change(connection: Connection) -> None:
        new = values(checkpoint)
        upsert(connection, _T, new, {name: new[name] for name in new if name != "path"})

    return change


def delete(path: str) -> Change:
    """Forget a checkpoint."""

    def change(connection: Connection) -> None:
        connection.execute(delete_rows(_T).where(_T.c.path == path))

    return change


def set_fields(path: str, **fields: Any) -> Change:
    """Change `public` or `expires` of a checkpoint."""

    def change(connection: Connection) -> None:
        connection.execute(update(_T).where(_T.c.path == path).values(**fields))

    return change


def get(project: str, path: str) -> Callable[[Connection], Checkpoint | None]:
    """Return a checkpoint of a project."""
    query = select(_T).where(_T.c.path == path, _T.c.project == project)
    return lambda connection: first(Checkpoint, connection.execute(query).mappings())


def readable(project: str, path: str) -> Callable[[Connection], Checkpoint | None]:
    """Return a checkpoint that a project may read: its own, or a public one."""
    allowed = or_(_T.c.project == project, _T.c.public.is_(True))
    query = select(_T).where(_T.c.path == path, allowed)
    return lambda connection: first(Checkpoint, connection.execute(query).mappings())


def expired(now: float) -> Callable[[Connection], list[Checkpoint]]:
    """Return checkpoints of all projects whose time is over."""
    query = select(_T).where(_T.c.expires < now).limit(1000)
    return lambda connection: [
        record(Checkpoint, row) for row in connection.execute(query).mappings()
    ]


def list_page(
    project: str, *, run: str | None = None, limit: int = 1000, offset: int = 0
) -> Callable[[Connection], tuple[list[Checkpoint], int]]:
    """Return some checkpoints of a project, or of one of its runs, the newest first; and how many
    there are."""
    mine = _T.c.project == project
    if run is not None:
        mine &= _T.c.run == run
    query = select(_T).where(mine).order_by(_T.c.created.desc(), _T.c.path)
    count = select(func.count()).select_from(_T).where(mine)

    def read(connection: Connection) -> tuple[list[Checkpoint], int]:
        rows = connection.execute(query.limit(limit).offset(offset)).mappings()
        return [record(Checkpoint, row) for row in rows], connection.execute(count).scalar_one()

    return read


def last_of(run: str) -> Callable[[Connection], dict[str, Checkpoint]]:
    """Return the newest checkpoint of a run of each kind."""
    query = select(_T).where(_T.c.run == run).order_by(_T.c.created)

    def read(connection: Connection) -> dict[str, Checkpoint]:
        found = [record(Checkpoint, row) for row in connection.execute(query).mappings()]
        return {each.kind: each for each in found}

    return read


def sizes(project: str, *, session: str | None = None) -> Callable[[Connection], tuple[int, int]]:
    """Return how many checkpoints a project, or one of its sessions, has, and their bytes."""
    mine = _T.c.project == project
    if session is not None:
        mine &= _T.c.run.startswith(f"{session}:", autoescape=True)
    query = select(func.count(), func.coalesce(func.sum(_T.c.size_bytes), 0)).where(mine)

    def read(connection: Connection) -> tuple[int, int]:
        count, size = connection.execute(query).one()
        return int(count), int(size)

    return read
