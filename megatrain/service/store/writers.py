"""Which group each writing process has committed last: told from the database after a lost commit.

The row is locked until its transaction ends, so a try that comes again waits for the one before it,
even if the server still works on that.
"""

import time
import uuid
from functools import cache

from sqlalchemy import Connection, Executable, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from megatrain.service.store import tables

_T = tables.writers


def new_id() -> str:
    """Return a name for a process that writes."""
    return uuid.uuid4().hex


def note(connection: Connection, writer: str, number: int) -> None:
    """Leave a group's number with what it writes."""
    row = {"id": writer, "number": number, "time": time.time()}
    connection.execute(_note(connection.dialect.name), row)


@cache  # every commit has it: making the statement anew takes longer than running it
def _note(dialect: str) -> Executable:
    statement = (postgresql if dialect == "postgresql" else sqlite).insert(_T)
    changed = {name: statement.excluded[name] for name in ("number", "time")}
    return statement.on_conflict_do_update(index_elements=["id"], set_=changed)


def has_committed(connection: Connection, writer: str, number: int) -> bool:
    """Tell whether a group was committed; wait for the database to be done with it."""
    query = select(_T.c.number).where(_T.c.id == writer).with_for_update()
    return connection.execute(query).scalar() == number


def forget(connection: Connection, before: float) -> int:
    """Forget processes that have not written since; return how many."""
    return connection.execute(delete(_T).where(_T.c.time < before)).rowcount
