"""Runs."""

from collections.abc import Callable
from functools import cache
from typing import Any

from sqlalchemy import Connection, Executable, bindparam, func, insert, select, update

from megatrain.service.store import tables
from megatrain.service.store.records import Run
from megatrain.service.store.rows import first, record, values
from megatrain.service.store.store import Change

_T = tables.runs


def add(run: Run) -> Change:
    """Keep a run."""

    def change(connection: Connection) -> None:
        connection.execute(insert(_T).values(**values(run)))

    return change


def _set(run_id: str, **fields: Any) -> Change:
    def change(connection: Connection) -> None:
        connection.execute(update(_T).where(_T.c.id == run_id).values(**fields))

    return change


def progress(run_id: str, next_seq: int, step: int, when: float) -> Change:
    """Note how far a run is."""

    row = {"the_id": run_id, "new_seq": next_seq, "new_step": step, "when": when}

    def change(connection: Connection) -> None:
        connection.execute(_progress(connection.dialect.name), row)

    return change


@cache  # every result has it: making the statement anew takes longer than running it
def _progress(dialect: str) -> Executable:
    furthest = func.max if dialect == "sqlite" else func.greatest
    fields = {
        "next_seq": furthest(_T.c.next_seq, bindparam("new_seq")),
        "step": bindparam("new_step"),
        "last_request": bindparam("when"),
    }
    return update(_T).where(_T.c.id == bindparam("the_id")).values(**fields)


def set_state(run_id: str, state: str) -> Change:
    """Note that a run is live, released or failed."""
    return _set(run_id, state=state)


def get(project: str, run_id: str) -> Callable[[Connection], Run | None]:
    """Return a run of a project."""
    query = select(_T).where(_T.c.id == run_id, _T.c.project == project)
    return lambda connection: first(Run, connection.execute(query).mappings())


def live() -> Callable[[Connection], list[Run]]:
    """Return the runs of all projects that are, or shall be, on the ranks."""
    query = select(_T).where(_T.c.state.in_(["creating", "live"])).order_by(_T.c.created)
    return lambda connection: [record(Run, row) for row in connection.execute(query).mappings()]


def ids_of(session_id: str) -> Callable[[Connection], list[str]]:
    """Return the ids of a session's runs."""
    query = select(_T.c.id).where(_T.c.session == session_id).order_by(_T.c.created)
    return lambda connection: list(connection.execute(query).scalars())


def list_page(
    project: str, limit: int, offset: int
) -> Callable[[Connection], tuple[list[Run], int]]:
    """Return some runs of a project, the newest first, and how many there are."""
    mine = _T.c.project == project
    query = select(_T).where(mine).order_by(_T.c.created.desc(), _T.c.id)
    count = select(func.count()).select_from(_T).where(mine)

    def read(connection: Connection) -> tuple[list[Run], int]:
        rows = connection.execute(query.limit(limit).offset(offset)).mappings()
        return [record(Run, row) for row in rows], connection.execute(count).scalar_one()

    return read
