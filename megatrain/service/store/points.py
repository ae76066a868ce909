"""Curves of runs."""

from collections.abc import Callable, Collection, Sequence

from sqlalchemy import Connection, func, select

from megatrain.errors import DataError
from megatrain.service.store import tables
from megatrain.service.store.records import Point
from megatrain.service.store.rows import upsert, values
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
    """Return a run's curves by name, of what was added from a time on.

    Of curves longer than `most` it is every n-th point, and the last: chosen by the database, which
    takes a tenth of the time that it takes to make values of all.
    """
    place = func.row_number().over(partition_by=_T.c.name, order_by=_T.c.step)
    size = func.count().over(partition_by=_T.c.name)
    mine = _T.c.run == run
    every = select(_T.c.name, _T.c.step, _T.c.time, _T.c.value, place.label("place"))
    every = every.add_columns(size.label("size")).where(mine, _T.c.time >= since)
    found = every.subquery().c
    is_nth = (found.place - 1) % ((found.size + most - 1) // most) == 0
    query = select(found.name, found.step, found.time, found.value)
    query = query.where(is_nth | (found.place == found.size)).order_by(found.name, found.step)

    def read(connection: Connection) -> dict[str, list[Point]]:
        curves: dict[str, list[Point]] = {}
        for name, step, time, value in connection.execute(query):
            curves.setdefault(name, []).append(Point(run, step, time, name, value))
        return curves

    return read


def last_losses(project: str, run_ids: Collection[str]) -> Callable[[Connection], dict[str, float]]:
    """Return the loss of the last step of some runs of a project, where they have one."""
    query = (
        select(_T.c.run, _T.c.value)
        .join(_RUNS, (_RUNS.c.id == _T.c.run) & (_RUNS.c.step == _T.c.step))
        .where(_RUNS.c.project == project, _RUNS.c.id.in_(run_ids), _T.c.name == "loss")
    )
    return lambda connection: {run: float(value) for run, value in connection.execute(query)}
