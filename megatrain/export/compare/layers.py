"""Two traces compared point by point: the first module that differs, forward or backward."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatrain.errors import ExportError
from megatrain.export.compare.trace import Floats, Point


@dataclass(frozen=True, slots=True)
class PointDistance:
    """How far apart two runs are at one point."""

    name: str
    activation: float
    """The largest difference, relative to the largest entry of A."""
    gradient: float | None
    """The same of the gradient of the loss; None where one of them has none."""


@dataclass(frozen=True, slots=True)
class LayersReport:
    """Every point that both runs have, in the order of execution of A."""

    points: tuple[PointDistance, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    tolerance: float
    how_a: str
    how_b: str

    @property
    def first_activation(self) -> PointDistance | None:
        """The first point whose activation differs, in the order of execution."""
        return next((p for p in self.points if not p.activation <= self.tolerance), None)

    @property
    def first_gradient(self) -> PointDistance | None:
        """The first point whose gradient differs, in the order of the backward pass."""
        backward = (p for p in reversed(self.points) if p.gradient is not None)
        return next((p for p in backward if not (p.gradient or 0.0) <= self.tolerance), None)

    @property
    def same(self) -> bool:
        """Tell whether nothing differs by more than the tolerance."""
        return self.first_activation is None and self.first_gradient is None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        firsts = {"first_activation": self.first_activation, "first_gradient": self.first_gradient}
        names = {key: None if point is None else point.name for key, point in firsts.items()}
        return {"layers": asdict(self) | names, "same": self.same}


def compare_traces(
    a: Mapping[str, Point], b: Mapping[str, Point], *, tolerance: float, how: tuple[str, str]
) -> LayersReport:
    """Compare what two runs saw.  Raises ExportError if they have no point in common."""
    common = [name for name in a if name in b]
    if len(common) < 2:
        raise ExportError(
            f"the two runs have no modules of the same names: {', '.join([*a][:3])} in A, "
            f"{', '.join([*b][:3])} in B",
            hint="compare models of one architecture",
        )
    return LayersReport(
        points=tuple(_distance(a[name], b[name]) for name in common),
        only_in_a=tuple(name for name in a if name not in b),
        only_in_b=tuple(name for name in b if name not in a),
        tolerance=tolerance,
        how_a=how[0],
        how_b=how[1],
    )


def _distance(a: Point, b: Point) -> PointDistance:
    gradient = None
    if a.gradients and a.gradients.keys() == b.gradients.keys():
        gradient = _relative(a.name, a.gradients, b.gradients)
    return PointDistance(a.name, _relative(a.name, a.values, b.values), gradient)


def _relative(name: str, a: Mapping[int, Floats], b: Mapping[int, Floats]) -> float:
    if a.keys() != b.keys() or any(a[i].shape != b[i].shape for i in a):
        shapes = [{i: each.shape for i, each in side.items()} for side in (a, b)]
        raise ExportError(f"{name} has other shapes in B than in A: {shapes[0]}, {shapes[1]}")
    largest = max(float(np.abs(a[i] - b[i]).max(initial=0.0)) for i in a)
    scale = max(float(np.abs(a[i]).max(initial=0.0)) for i in a)
    return 0.0 if largest == 0.0 else largest / scale if scale else float("inf")
