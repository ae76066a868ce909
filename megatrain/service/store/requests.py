"""Requests and their results."""

from collections.abc import Callable

from sqlalchemy import Connection, delete, insert, select, update

from megatrain.service.store import tables
from megatrain.service.store.records import Request
from megatrain.service.store.rows import first, record, values
from megatrain.service.store.store import Change

_T = tables.requests


def add(request: Request) -> Change:
    """Keep a request."""
    return lambda connection: _run(connection, insert(_T).values(**values(request)))


def _run(connection: Connection, statement: object) -> None:
    connection.execute(statement)  # type: ignore[call-overload]


def finish(
    request_id: str, state: str, result: bytes, result_type: str, finished: float, tokens: int
) -> Change:
    """Keep a request's result; its payload is needed no longer."""
    statement = (
        update(_T)
        .where(_T.c.id == request_id, _T.c.state == "queued")
        .values(
            state=state,
            result=result,
            result_type=result_type,
            finished=finished,
            tokens=tokens,
            payload=b"",
        )
    )
    return lambda connection: _run(connection, statement)


def get(project: str, request_id: str) -> Callable[[Connection], Request | None]:
    """Return a request of a project."""
    query = select(_T).where(_T.c.id == request_id, _T.c.project == project)
    return lambda connection: first(Request, connection.execute(query).mappings())


def by_idem(project: str, idem: str) -> Callable[[Connection], Request | None]:
    """Return the request of a project that is the same."""
    query = select(_T).where(_T.c.idem == idem, _T.c.project == project)
    return lambda connection: first(Request, connection.execute(query).mappings())


def open_requests() -> Callable[[Connection], list[Request]]:
    """Return what waits, of all projects, in the order of runs and numbers."""
    query = select(_T).where(_T.c.state == "queued").order_by(_T.c.run, _T.c.seq)
    return lambda connection: [record(Request, row) for row in connection.execute(query).mappings()]


def finished_seqs(run: str, first_seq: int) -> Callable[[Connection], list[int]]:
    """Return the numbers of a run that are finished, from one on."""
    query = select(_T.c.seq).where(_T.c.run == run, _T.c.seq >= first_seq, _T.c.state != "queued")
    return lambda connection: list(connection.execute(query).scalars())


def expire(before: float) -> Change:
    """Forget results that were made before."""
    statement = delete(_T).where(_T.c.state != "queued", _T.c.finished < before)
    return lambda connection: _run(connection, statement)
