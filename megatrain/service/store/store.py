"""The database: reads from threads, writes through one that commits all that wait together.

A write returns when it is committed.  Each is a savepoint of its own, so that one that is refused
does not take others with it.  Where a connection breaks while a group is committed, nobody knows
whether it was: each group leaves its number in the row of its writer, which tells.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Self

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError as RefusedValue
from sqlalchemy.exc import DBAPIError, OperationalError

from megatrain.errors import DataError, StateError
from megatrain.service.observe.series import CommitSeries
from megatrain.service.store import writers
from megatrain.service.store.engine import open_engine

logger = logging.getLogger(__name__)

Change = Callable[[Connection], None]
"""Something to write."""

MAX_GROUP = 256
"""Writes that are committed together."""
LOST_S = 60.0
"""Seconds that a write waits for a database that is away."""
RETRY_S = 0.5
"""Seconds between two tries."""

_Entry = tuple[Sequence[Change], "Future[None]"]


class Store:
    """One database."""

    def __init__(self, engine: Engine) -> None:
        """`engine` is open_engine's.  Leaves a row that this process is known by."""
        self._engine = engine
        self._writer_id = writers.new_id()
        with engine.begin() as connection:
            writers.note(connection, self._writer_id, 0)
        self._number = 0
        self._is_closed = False
        self.series = CommitSeries()
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="store-writer", daemon=True)
        self._writer.start()

    @classmethod
    async def open(cls, url: str) -> Self:
        """Open a database by SQLAlchemy's URL, and bring its tables up to date.

        Raises ConfigError for a URL that is none, StateError for a database that is not there, or
        was written by a later version.
        """
        return await asyncio.to_thread(lambda: cls(open_engine(url)))

    async def write(self, *changes: Change) -> None:
        """Commit changes, all of them or none; return when they are committed.

        A caller that is cancelled meanwhile has its changes committed all the same.

        Raises what the database says of them, DataError for a value that it cannot hold, and
        StateError if it stays away or was closed.
        """
        if self._is_closed:
            raise StateError("the store is closed")
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # or a cancelled caller would cancel it
        self._queue.put((changes, done))
        await asyncio.wrap_future(done)

    async def write_surely(self, *changes: Change) -> None:
        """Commit changes as `write` does, however long the database stays away.

        Raises StateError once the store is closed.
        """
        while True:
            try:
                return await self.write(*changes)
            except StateError as error:
                if self._is_closed:
                    raise
                logger.warning("a result waits for the database: %s", error.message)
                await asyncio.sleep(RETRY_S)

    async def read[T](self, query: Callable[[Connection], T]) -> T:
        """Return what a query finds.

        Raises StateError if the database stays away, DataError for a value that it cannot know.
        """
        return await asyncio.to_thread(self._read, query)

    def _read[T](self, query: Callable[[Connection], T]) -> T:
        limit = time.monotonic() + LOST_S
        while True:
            try:
                with self._engine.connect() as connection:
                    return query(connection)
            except DBAPIError as error:
                if not _is_lost(error):
                    raise _said(error) from None
                if time.monotonic() > limit:
                    raise StateError(f"the database could not be read: {error.orig}") from error
                time.sleep(RETRY_S)
            except (UnicodeEncodeError, OverflowError) as error:
                raise _said(error) from None

    async def close(self) -> None:
        """Commit what waits, and close."""
        self._is_closed = True
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
        began = time.monotonic()
        try:
            failures = self._until_committed(group)
            self.series.committed(len(group), time.monotonic() - began)
        except DBAPIError as error:
            said = StateError(f"the database could not be written: {error.orig}")
            failures = dict.fromkeys(range(len(group)), said)
        except BaseException as error:  # noqa: BLE001 - who waits must hear of it
            failures = dict.fromkeys(range(len(group)), error)
        for index, (_, done) in enumerate(group):
            if index in failures:
                done.set_exception(failures[index])
            else:
                done.set_result(None)

    def _until_committed(self, group: list[_Entry]) -> dict[int, BaseException]:
        """Try until the database is there; return what was refused of a group."""
        limit = time.monotonic() + LOST_S
        self._number += 1
        failures: dict[int, BaseException] = {}
        is_again = False
        while True:
            try:
                with self._engine.begin() as connection:
                    if is_again and writers.has_committed(
                        connection, self._writer_id, self._number
                    ):
                        return failures
                    failures = _apply(connection, group)
                    writers.note(connection, self._writer_id, self._number)
            except DBAPIError as error:
                if not _is_lost(error) or time.monotonic() > limit:
                    raise
                logger.warning("the database is away, and a write waits: %s", error.orig)
                is_again = True
                time.sleep(RETRY_S)
            else:
                return failures


def _apply(connection: Connection, group: list[_Entry]) -> dict[int, BaseException]:
    """Do the changes of a group; return what was refused of it, by place in the group."""
    failures: dict[int, BaseException] = {}
    for index, (changes, _) in enumerate(group):
        try:
            with connection.begin_nested():
                for change in changes:
                    change(connection)
        except DBAPIError as error:
            if _is_lost(error):
                raise
            failures[index] = _said(error)
        except Exception as error:  # noqa: BLE001 - a change of another is to go on
            failures[index] = _said(error)
    return failures


def _said(error: Exception) -> Exception:
    """Return an error as the caller shall hear it: a value that no column holds is the user's."""
    if isinstance(error, RefusedValue):
        return DataError(f"the database cannot hold this: {error.orig}")
    if isinstance(error, UnicodeEncodeError | OverflowError):
        return DataError(f"the database cannot hold this: {error}")
    return error


def _is_lost(error: DBAPIError) -> bool:
    text = str(error.orig)
    return error.connection_invalidated or (
        isinstance(error, OperationalError) and "no such" not in text and "syntax" not in text
    )
