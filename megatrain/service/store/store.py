"""The database: reads from threads, writes through one that commits all that wait together.

A write returns when it is committed.  Each is a savepoint of its own, so that one that is refused
does not take others with it.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Self

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from megatrain.errors import ConfigError, StateError
from megatrain.service.store.migrate import migrate

logger = logging.getLogger(__name__)

Change = Callable[[Connection], None]
"""Something to write."""

MAX_GROUP = 256
"""Writes that are committed together."""
LOST_S = 60.0
"""Seconds that a write waits for a database that is away."""

_Entry = tuple[Sequence[Change], "Future[None]"]


class Store:
    """One database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="store-writer", daemon=True)
        self._writer.start()

    @classmethod
    async def open(cls, url: str) -> Self:
        """Open a database by SQLAlchemy's URL, and bring its tables up to date.

        Raises ConfigError for a URL that is none, StateError for a database that is not there, or
        was written by a later version.
        """
        return cls(await asyncio.to_thread(_engine, url))

    async def write(self, *changes: Change) -> None:
        """Commit changes, all of them or none; return when they are committed.

        Raises what the database says of them, StateError if it stays away.
        """
        done: Future[None] = Future()
        self._queue.put((changes, done))
        await asyncio.wrap_future(done)

    async def read[T](self, query: Callable[[Connection], T]) -> T:
        """Return what a query finds."""
        return await asyncio.to_thread(self._read, query)

    def _read[T](self, query: Callable[[Connection], T]) -> T:
        limit = time.monotonic() + LOST_S
        while True:
            try:
                with self._engine.connect() as connection:
                    return query(connection)
            except DBAPIError as error:
                if not _is_lost(error) or time.monotonic() > limit:
                    raise
                time.sleep(0.5)

    async def close(self) -> None:
        """Commit what waits, and close."""
        self._queue.put(None)
        await asyncio.to_thread(self._writer.join)
        self._engine.dispose()

    def _write_all(self) -> None:
        ended = False
        while not ended:
            group, ended = self._next_group()
            if group:
                self._commit(group)

    def _next_group(self) -> tuple[list[_Entry], bool]:
        """Wait for a write; return it with all that wait behind it, and whether that was all."""
        group: list[_Entry] = []
        entry = self._queue.get()
        while entry is not None:
            group.append(entry)
            if len(group) >= MAX_GROUP:
                return group, False
            try:
                entry = self._queue.get_nowait()
            except queue.Empty:
                return group, False
        return group, True

    def _commit(self, group: list[_Entry]) -> None:
        limit = time.monotonic() + LOST_S
        while True:
            try:
                failures = self._try(group)
            except DBAPIError as error:
                if _is_lost(error) and time.monotonic() < limit:
                    logger.warning("the database is away, and a write waits: %s", error.orig)
                    time.sleep(0.5)
                    continue
                said = StateError(f"the database could not be written: {error.orig}")
                failures = dict.fromkeys(range(len(group)), said)
            except BaseException as error:  # noqa: BLE001 - who waits must hear of it
                failures = dict.fromkeys(range(len(group)), error)
            break
        for index, (_, done) in enumerate(group):
            if index in failures:
                done.set_exception(failures[index])
            else:
                done.set_result(None)

    def _try(self, group: list[_Entry]) -> dict[int, BaseException]:
        """Write and commit a group; return what was refused of it."""
        failures: dict[int, BaseException] = {}
        with self._engine.begin() as connection:
            for index, (changes, _) in enumerate(group):
                try:
                    with connection.begin_nested():
                        for change in changes:
                            change(connection)
                except DBAPIError as error:
                    if _is_lost(error):
                        raise
                    failures[index] = error
                except Exception as error:  # noqa: BLE001 - a change of another is to go on
                    failures[index] = error
        return failures


def _is_lost(error: DBAPIError) -> bool:
    text = str(error.orig)
    return error.connection_invalidated or (
        isinstance(error, OperationalError) and "no such" not in text and "syntax" not in text
    )


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"not a database URL: {url!r}", hint="sqlite:///FILE") from error
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    is_sqlite = parsed.get_backend_name() == "sqlite"
    options: dict[str, Any] = {"connect_args": {"timeout": 30}} if is_sqlite else {}
    try:
        engine = create_engine(parsed, pool_pre_ping=not is_sqlite, pool_size=8, **options)
    except ImportError as error:
        raise ConfigError(
            f"the driver of {parsed.drivername} is not installed: {error}",
            hint="pip install 'megatrain[postgres]'",
        ) from error
    if is_sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    try:
        migrate(engine)
    except OperationalError as error:
        engine.dispose()
        raise StateError(f"the database {parsed!r} cannot be opened: {error.orig}") from error
    return engine


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # SQLAlchemy begins; sqlite3 would commit behind its back
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
