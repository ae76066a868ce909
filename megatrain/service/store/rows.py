"""Records to rows and back; one way for all tables."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import RowMapping


def values(record: Any) -> dict[str, Any]:
    """Return a record's fields as a row takes them."""
    found = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in found.items()
    }


def record[T](kind: type[T], row: RowMapping) -> T:
    """Return a row as a record."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    found = {name: row[name] for name in fields}
    for name, value in found.items():
        if isinstance(value, list):
            found[name] = tuple(value)
    return kind(**found)


def first[T](kind: type[T], rows: Iterable[RowMapping]) -> T | None:
    """Return the first of some rows, or None."""
    return next((record(kind, row) for row in rows), None)


def upsert(
    connection: Connection, table: Table, new: dict[str, Any], update: dict[str, Any]
) -> None:
    """Insert a row, or change the one that has its primary key."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).values(**new)
    keys = [column.name for column in table.primary_key]
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=update))
