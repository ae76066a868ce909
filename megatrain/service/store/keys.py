"""API keys and projects."""

from collections.abc import Callable

from sqlalchemy import Connection, insert, select, update

from megatrain.service.store import tables
from megatrain.service.store.records import ApiKey, Project
from megatrain.service.store.rows import first, record, upsert, values
from megatrain.service.store.store import Change

_T = tables.keys


def add(key: ApiKey) -> Change:
    """Keep a key."""

    def change(connection: Connection) -> None:
        new = values(key)
        del new["id"]
        connection.execute(insert(_T).values(**new))

    return change


def add_project(project: Project) -> Change:
    """Keep a project."""

    def change(connection: Connection) -> None:
        upsert(connection, tables.projects, values(project), {"name": project.name})

    return change


def by_hash(digest: str) -> Callable[[Connection], ApiKey | None]:
    """Return the key with a hash."""
    query = select(_T).where(_T.c.hash == digest)
    return lambda connection: first(ApiKey, connection.execute(query).mappings())


def all_keys() -> Callable[[Connection], list[ApiKey]]:
    """Return all keys, in the order in which they were made."""
    query = select(_T).order_by(_T.c.id)
    return lambda connection: [record(ApiKey, row) for row in connection.execute(query).mappings()]


def revoke(key_id: int, when: float) -> Change:
    """End a key."""

    def change(connection: Connection) -> None:
        statement = update(_T).where(_T.c.id == key_id, _T.c.revoked.is_(None))
        connection.execute(statement.values(revoked=when))

    return change


def used(key_id: int, when: float) -> Change:
    """Note when a key was last used."""

    def change(connection: Connection) -> None:
        connection.execute(update(_T).where(_T.c.id == key_id).values(last_used=when))

    return change
