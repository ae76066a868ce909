"""What `megatrain convert verify` prints: the first differences of each kind, and their number."""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

from megatrain.export.compare.files import FilesReport
from megatrain.export.compare.layers import LayersReport, PointDistance
from megatrain.export.compare.logprobs import LogprobsReport
from megatrain.export.compare.numeric import Distance

SHOWN = 5
"""Differences of a kind that are named."""


@singledispatch
def lines(report: Any) -> list[str]:
    """Return the lines of a report."""
    raise NotImplementedError(type(report))


@lines.register
def _files(report: FilesReport) -> list[str]:
    result = [
        *_some("only in A", report.only_in_a),
        *_some("only in B", report.only_in_b),
        *_some("other options", _pairs(report.options)),
        *_some("other shapes", _pairs(report.shapes)),
        *_some("other dtypes", _pairs(report.dtypes)),
        *_some("other values", [_value(report, name) for name in report.values]),
    ]
    if report.largest is not None:
        result.append(
            f"largest difference: {report.largest.relative:.3g} of the tensor's largest entry "
            f"({report.largest.max_abs:.3g})"
        )
    compared = f"{report.num_compared:,} tensors compared"
    return [*result, f"{_verdict(report.same)}: {compared}"]


@lines.register
def _logprobs(report: LogprobsReport) -> list[str]:
    return [
        f"A: {report.how_a}",
        f"B: {report.how_b}",
        f"largest difference: {report.max_difference:.3g}, at token {report.position} of sequence "
        f"{report.datum} (id {report.token}): {report.logprob_a:.6f} in A, "
        f"{report.logprob_b:.6f} in B",
        f"mean difference: {report.mean_difference:.3g}",
        f"{_verdict(report.same)}: {report.num_tokens:,} tokens compared, "
        f"tolerance {report.tolerance:g}",
    ]


@lines.register
def _layers(report: LayersReport) -> list[str]:
    largest = max(report.points, key=lambda point: point.activation)
    gradients = [point for point in report.points if point.gradient is not None]
    steepest = max(gradients, key=lambda point: point.gradient or 0.0, default=None)
    result = [f"A: {report.how_a}", f"B: {report.how_b}"]
    for what, point in (
        ("first module that differs", report.first_activation),
        ("first gradient that differs, backward", report.first_gradient),
    ):
        if point is not None:
            result.append(f"{what}: {_point(point)}")
    result.append(f"largest difference of activations: {_point(largest)}")
    if steepest is not None:
        result.append(f"largest difference of gradients: {_point(steepest)}")
    alone = len(report.only_in_a) + len(report.only_in_b)
    return [
        *result,
        f"{_verdict(report.same)}: {len(report.points):,} points compared, {len(gradients):,} of "
        f"them with gradients, {alone:,} that one side alone has; tolerance {report.tolerance:g}",
    ]


def _point(point: PointDistance) -> str:
    gradient = "" if point.gradient is None else f", gradient by {point.gradient:.3g}"
    return f"{point.name} (by {point.activation:.3g}{gradient})"


def _verdict(same: bool) -> str:
    return "the same" if same else "they differ"


def _value(report: FilesReport, name: str) -> str:
    match report.values[name]:
        case Distance() as found:
            return f"{name} (by {found.max_abs:.3g}, {found.relative:.3g} of the largest entry)"
        case None:
            a, b = report.checksums[name]
            return f"{name} (checksum {a} in A, {b} in B)"


def _pairs(found: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [f"{name}: {_short(a)} in A, {_short(b)} in B" for name, (a, b) in found.items()]


def _short(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _some(what: str, names: Sequence[str]) -> list[str]:
    """Return one line that counts them, and one for each of the first."""
    if not names:
        return []
    more = [f"  and {len(names) - SHOWN:,} more"] if len(names) > SHOWN else []
    return [f"{what}: {len(names):,}", *(f"  {name}" for name in names[:SHOWN]), *more]
