"""Which group each writing process has committed last: told from the database after a lost commit.

The row is locked until its transaction ends, so a try that comes again waits for the one before it,
even if the server still works on that.
"""

import time
import uuid

from sqlalchemy import Connection, delete, select

from megatrain.service.store import tables
from megatrain.service.store.rows import upsert

_T = tables.writers


def new_id() -> str:
    """Return a name for a process that writes."""
    return uuid.uuid4().hex


def note(connection: Connection, writer: str, number: int) -> None:
    """Leave a group's number with what it writes."""
    now = time.time()
    new = {"id": writer, "number": number, "time": now}
    upsert(connection, _T, new, {"number": number, "time": now})


def has_committed(connection: Connection, writer: str, number: int) -> bool:
    """Tell whether a group was committed; wait for the database to be done with it."""
    query = select(_T.c.number).where(_T.c.id == writer).with_for_update()
    return connection.execute(query).scalar() == number


def forget(connection: Connection, before: float) -> int:
    """Forget processes that have not written since; return how many."""
    return connection.execute(delete(_T).where(_T.c.time < before)).rowcount
