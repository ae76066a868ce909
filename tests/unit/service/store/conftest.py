"""Databases: SQLite in a folder, and a PostgreSQL of the test's own where it is installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tests.service.postgres import Postgres, programs, running


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed")
    with running() as cluster:
        yield cluster


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of a database that is not there yet."""
    return f"sqlite:///{tmp_path / 'service.db'}"


@pytest.fixture
def empty_postgres(postgres: Postgres) -> Iterator[str]:
    """URL of a PostgreSQL without tables."""
    yield postgres.url
    engine = create_engine(postgres.url.replace("postgresql", "postgresql+psycopg", 1))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()


@pytest.fixture(params=["sqlite_url", "empty_postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """URL of an empty database, of both kinds."""
    found: str = request.getfixturevalue(request.param)
    return found
