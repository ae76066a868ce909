"""Brings a database's tables up to date, one process at a time."""

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from megatrain.errors import StateError

_LOCK = 0x6D656761
"""Of PostgreSQL's advisory locks: nobody else migrates meanwhile."""
IMMEDIATE = "megatrain_immediate"
"""Option of a connection: SQLite takes its lock at the begin, before anything is read."""


def migrate(engine: Engine) -> None:
    """Run the migrations that a database lacks.  Raises StateError for one of a later version."""
    with engine.execution_options(**{IMMEDIATE: True}).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        config.attributes["connection"] = connection
        _check_known(connection, ScriptDirectory.from_config(config))
        before = logging.getLogger("alembic").level
        logging.getLogger("alembic").setLevel(logging.WARNING)
        try:
            command.upgrade(config, "head")
        finally:
            logging.getLogger("alembic").setLevel(before)


def _check_known(connection: Connection, scripts: ScriptDirectory) -> None:
    current = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in scripts.walk_revisions()}
    if current is not None and current not in known:
        raise StateError(
            f"the database is of version {current}, which this megatrain does not know",
            hint="use the megatrain that wrote it, or a later one",
        )
