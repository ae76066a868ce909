"""Curves of runs."""

from collections.abc import Callable, Collection, Sequence

from sqlalchemy import Connection, func, select

from megatrain.errors import DataError
from megatrain.service.store import tables
from megatrain.service.store.records import Point
from megatrain.service.store.rows import record, upsert, values
from megatrain.service.store.store import Change

_T, _RUNS = tables.points, tables.runs


def add(points: Sequence[Point]) -> Change:
    """Keep points; a step that is done again counts anew."""

    def change(connection: Connection) -> None:
        for point in points:
            new = values(point)
            upsert(connection, _T, new, {"time": new["time"], "value": new["value"]})

    return change


def add_within(
    points: Sequence[Point], *, own: Collection[str], max_names: int, max_points: int
) -> Change:
    """Keep points of one run that a client sends, if it does not have too many then.

    `own` are names that do not count.  Raises DataError, from the write.
    """
    mine = (_T.c.run == points[0].run) & _T.c.name.not_in(own)
    counts = select(_T.c.name, func.count()).where(mine).group_by(_T.c.name)

    def change(connection: Connection) -> None:
        add(points)(connection)
        found = [int(count) for _, count in connection.execute(counts)]
        if len(found) > max_names or sum(found) > max_points:
            raise DataError(
                f"a run may have {max_names} curves of a client's own, of {max_points} points in "
                f"all; with these it would have {len(found)}, of {sum(found)}"
            )

    return change


def of_run(
    run: str, *, since: float = 0.0, most: int = 2000
) -> Callable[[Connection], dict[str, list[Point]]]:
    """Return a run's curves by name, of what was added from a time on: every n-th point, and the
    last, of long ones."""
    query = select(_T).where(_T.c.run == run, _T.c.time >= since).order_by(_T.c.name, _T.c.step)

    def read(connection: Connection) -> dict[str, list[Point]]:
        curves: dict[str, list[Point]] = {}
        for row in connection.execute(query).mappings():
            curves.setdefault(row["name"], []).append(record(Point, row))
        return {name: _thinned(curve, most) for name, curve in curves.items()}

    return read


def last_losses(project: str, run_ids: Collection[str]) -> Callable[[Connection], dict[str, float]]:
    """Return the loss of the last step of some runs of a project, where they have one."""
    query = (
        select(_T.c.run, _T.c.value)
        .join(_RUNS, (_RUNS.c.id == _T.c.run) & (_RUNS.c.step == _T.c.step))
        .where(_RUNS.c.project == project, _RUNS.c.id.in_(run_ids), _T.c.name == "loss")
    )
    return lambda connection: {run: float(value) for run, value in connection.execute(query)}


def _thinned(curve: list[Point], most: int) -> list[Point]:
    every = -(-len(curve) // most)
    return curve if every <= 1 else [*curve[:-1:every], curve[-1]]
