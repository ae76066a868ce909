"""Curves of runs."""

from collections.abc import Callable, Sequence

from sqlalchemy import Connection, select

from megatrain.service.store import tables
from megatrain.service.store.records import Point
from megatrain.service.store.rows import record, upsert, values
from megatrain.service.store.store import Change

_T = tables.points


def add(points: Sequence[Point]) -> Change:
    """Keep points; a step that is done again counts anew."""

    def change(connection: Connection) -> None:
        for point in points:
            new = values(point)
            upsert(connection, _T, new, {"time": new["time"], "value": new["value"]})

    return change


def of_run(run: str, *, most: int = 2000) -> Callable[[Connection], dict[str, list[Point]]]:
    """Return a run's curves by name: every n-th point, and the last, of long ones."""
    query = select(_T).where(_T.c.run == run).order_by(_T.c.name, _T.c.step)

    def read(connection: Connection) -> dict[str, list[Point]]:
        curves: dict[str, list[Point]] = {}
        for row in connection.execute(query).mappings():
            curves.setdefault(row["name"], []).append(record(Point, row))
        return {name: _thinned(curve, most) for name, curve in curves.items()}

    return read


def _thinned(curve: list[Point], most: int) -> list[Point]:
    every = -(-len(curve) // most)
    return curve if every <= 1 else [*curve[:-1:every], curve[-1]]
