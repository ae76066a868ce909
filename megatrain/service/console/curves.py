"""A run's curves as columns; and what clients add to them: no request says a reward."""

import time
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from megatrain.errors import DataError
from megatrain.service.console.view import Json, finite
from megatrain.service.store.records import Point
from megatrain.service.work.operations import CURVES

OVERLAP_S = 10.0
"""A point may be committed so long after its time: the next answer begins so much earlier."""
MAX_NAMES, MAX_POINTS = 32, 200_000
"""Curves that clients may add to a run, and all of their points."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/@\-]{0,63}$")]
Value = Annotated[float, Field(allow_inf_nan=False)]


class PointsBody(BaseModel):
    """Values of one step."""

    model_config = ConfigDict(extra="forbid")

    step: int = Field(ge=0, lt=2**31)
    values: dict[Name, Value] = Field(min_length=1, max_length=MAX_NAMES)


def points_of(run: str, body: PointsBody) -> list[Point]:
    """Return what a client adds to a run.  Raises DataError for the service's own names."""
    if taken := sorted(CURVES & body.values.keys()):
        raise DataError(
            f"{', '.join(taken)} is what the service itself measures", hint="choose another name"
        )
    now = time.time()
    return [Point(run, body.step, now, name, value) for name, value in body.values.items()]


def columns(curves: dict[str, list[Point]]) -> Json:
    """Return curves as columns of steps and values, None where a value is no number; and `until`,
    after which there may be more."""
    shown: dict[str, Any] = {
        name: {
            "steps": [point.step for point in curve],
            "values": [finite(point.value) for point in curve],
        }
        for name, curve in curves.items()
    }
    newest = max((point.time for curve in curves.values() for point in curve), default=0.0)
    return {"curves": shown, "until": max(0.0, newest - OVERLAP_S)}
