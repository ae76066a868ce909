"""Opens a database by its URL: SQLite in WAL mode, or PostgreSQL."""

import os
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from megatrain.errors import ConfigError, StateError
from megatrain.service.store.migrate import IMMEDIATE, migrate

CONNECT_S = 10
"""Seconds within which PostgreSQL must answer."""


def open_engine(url: str) -> Engine:
    """Return an engine on a database whose tables are up to date.

    Raises ConfigError for a URL that is none, StateError for a database that is not there, or was
    written by a later version.
    """
    parsed = _parsed(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    options = {"timeout": 30} if is_sqlite else {"connect_timeout": CONNECT_S}
    try:
        if is_sqlite:
            _make_private(parsed)
        engine = create_engine(
            parsed, pool_pre_ping=not is_sqlite, pool_size=8, connect_args=options
        )
    except ImportError as error:
        raise ConfigError(
            f"the driver of {parsed.drivername} is not installed: {error}",
            hint="pip install 'megatrain[postgres]'",
        ) from error
    except OSError as error:
        raise StateError(f"the database {parsed!r} cannot be opened: {error}") from error
    if is_sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin)
    try:
        migrate(engine)
    except OperationalError as error:
        engine.dispose()
        raise StateError(f"the database {parsed!r} cannot be opened: {error.orig}") from error
    except StateError:
        engine.dispose()
        raise
    return engine


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The text may hold a password: it is not shown.
        raise ConfigError(
            "the database's URL is none", hint="sqlite:///FILE or postgresql://USER@HOST/NAME"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(
            f"a database of {parsed.get_backend_name()} is not supported",
            hint="sqlite:///FILE or postgresql://USER@HOST/NAME",
        )
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError("the database must be a file", hint="sqlite:///FILE")
    return parsed


def _make_private(url: URL) -> None:
    """Make SQLite's file, which holds what clients send, readable by its owner alone."""
    file = Path(str(url.database))
    if not file.name.startswith("file:"):
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))


def _begin(connection: Connection) -> None:
    is_writing = connection.get_execution_options().get(IMMEDIATE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # SQLAlchemy begins; sqlite3 would commit behind its back
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
