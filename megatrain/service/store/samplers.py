"""Sampling sessions."""

from collections.abc import Callable

from sqlalchemy import Connection, select

from megatrain.service.store import tables
from megatrain.service.store.records import SamplingSession
from megatrain.service.store.rows import record, upsert, values
from megatrain.service.store.store import Change

_T, _SESSIONS = tables.samplers, tables.sessions


def add(sampler: SamplingSession) -> Change:
    """Keep a sampling session."""

    def change(connection: Connection) -> None:
        new = values(sampler)
        upsert(connection, _T, new, {name: new[name] for name in new if name != "id"})

    return change


def active(base_model: str) -> Callable[[Connection], list[SamplingSession]]:
    """Return sampling sessions of a base model whose session is not over."""
    query = (
        select(_T)
        .join(_SESSIONS, _SESSIONS.c.id == _T.c.session)
        .where(_T.c.base_model == base_model, _SESSIONS.c.status == "active")
        .order_by(_T.c.created)
    )
    return lambda connection: [
        record(SamplingSession, row) for row in connection.execute(query).mappings()
    ]


def ids_of(session_id: str) -> Callable[[Connection], list[str]]:
    """Return the ids of a session's sampling sessions."""
    query = select(_T.c.id).where(_T.c.session == session_id).order_by(_T.c.created)
    return lambda connection: list(connection.execute(query).scalars())
