"""Migrations make what the tables say, and a database of a later version is left alone."""

import asyncio

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from megatrain.errors import StateError
from megatrain.service.store import tables
from megatrain.service.store.store import Store


def test_migrations_make_the_tables_that_the_code_knows(url: str) -> None:
    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, tables.metadata))

    async def check() -> None:
        store = await Store.open(url)
        assert await store.read(differences) == []
        await store.close()

    asyncio.run(check())


def test_a_database_of_a_later_version_is_refused_and_left_alone(url: str) -> None:
    def later(connection: Connection) -> None:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    async def check() -> None:
        store = await Store.open(url)
        await store.write(later)
        await store.close()
        with pytest.raises(StateError, match="9999"):
            await Store.open(url)

    asyncio.run(check())
