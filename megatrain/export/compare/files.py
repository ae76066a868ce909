"""Two sets of tensors compared: names, shapes, dtypes, and values block by block."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from megatrain.export.compare.headers import StoredTensor
from megatrain.export.compare.numeric import Distance, distance
from megatrain.export.compare.source import Source


@dataclass
class FilesReport:
    """How two places differ."""

    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    options: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Of adapters: what decides what they compute."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)
    values: dict[str, Distance | None] = field(default_factory=dict)
    """By name, how far apart; None where bytes were compared."""
    checksums: dict[str, tuple[str, str]] = field(default_factory=dict)
    """XXH3-64 of each tensor's bytes in A and in B, of all tensors whose bytes were compared."""
    largest: Distance | None = None
    """Of all tensors that were compared by value."""
    num_compared: int = 0
    tolerance: float | None = None

    @property
    def same(self) -> bool:
        """Tell whether nothing differs; with a tolerance, dtypes may."""
        found = [self.only_in_a, self.only_in_b, self.options, self.shapes, self.values]
        return not any(found) and (self.tolerance is not None or not self.dtypes)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return asdict(self) | {"same": self.same}


def compare_files(
    a: Source,
    b: Source,
    *,
    tolerance: float | None,
    progress: Callable[[int], None] = lambda _: None,
) -> FilesReport:
    """Compare two places, one tensor after the other, a block of each in memory.

    Without a tolerance, tensors must have the same bytes; with one, no entry may differ by more
    than `tolerance` times the largest entry of A's tensor.  Masters of a training state are
    rounded to the other side's dtype.
    """
    report = FilesReport(
        only_in_a=sorted(a.tensors.keys() - b.tensors.keys()),
        only_in_b=sorted(b.tensors.keys() - a.tensors.keys()),
        options=_differences(a.options, b.options),
        tolerance=tolerance,
    )
    rounded = a.is_master != b.is_master
    for name in a.tensors:
        if name in b.tensors:
            _compare(report, a.tensors[name], b.tensors[name], name, rounded=rounded)
            progress(a.tensors[name].num_bytes)
    return report


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return {key: (a.get(key), b.get(key)) for key in keys}


def _compare(
    report: FilesReport, a: StoredTensor, b: StoredTensor, name: str, *, rounded: bool
) -> None:
    report.num_compared += 1
    if a.shape != b.shape:
        report.shapes[name] = (a.shape, b.shape)
        return
    if a.dtype != b.dtype and not rounded:
        report.dtypes[name] = (a.dtype, b.dtype)
    if report.tolerance is None and a.dtype == b.dtype:
        report.checksums[name] = found = (_checksum(a), _checksum(b))
        if found[0] != found[1]:
            report.values[name] = None
        return
    if report.tolerance is None and not rounded:
        return  # another dtype is a difference that is told already
    found_distance = distance(a, b, rounded=rounded)
    if report.largest is None or found_distance.relative > report.largest.relative:
        report.largest = found_distance
    if not found_distance.relative <= (report.tolerance or 0.0):
        report.values[name] = found_distance


def _checksum(tensor: StoredTensor) -> str:
    digest = xxhash.xxh3_64()
    for block in tensor.blocks():
        digest.update(block)
    return digest.hexdigest()
