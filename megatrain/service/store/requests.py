"""Requests and their results."""

from collections.abc import Callable

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from megatrain.service.store import tables
from megatrain.service.store.records import Request
from megatrain.service.store.rows import first, record, values
from megatrain.service.store.store import Change

_T = tables.requests
_FINISHED = ("state", "result", "result_type", "finished", "tokens")
"""Columns that a result sets."""
# Statements that every request runs are made once: making them takes longer than running them.
_ADD = insert(_T)
_FINISH = (
    update(_T)
    .where(_T.c.id == bindparam("the_id"), _T.c.state == "queued")
    .values(payload=b"", **{name: bindparam(f"new_{name}") for name in _FINISHED})
)


def add(request: Request) -> Change:
    """Keep a request."""

    def change(connection: Connection) -> None:
        connection.execute(_ADD, values(request))

    return change


def finish(
    request_id: str, state: str, result: bytes, result_type: str, finished: float, tokens: int
) -> Change:
    """Keep a request's result; its payload is needed no longer."""
    new = (state, result, result_type, finished, tokens)
    row = {f"new_{name}": value for name, value in zip(_FINISHED, new, strict=True)}

    def change(connection: Connection) -> None:
        connection.execute(_FINISH, {"the_id": request_id, **row})

    return change


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

    def change(connection: Connection) -> None:
        connection.execute(statement)

    return change
