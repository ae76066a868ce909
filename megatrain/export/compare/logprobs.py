"""Two runs' log-probabilities of the same tokens, compared token by token."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatrain.errors import ExportError
from megatrain.export.compare.tokens import Datum


@dataclass(frozen=True, slots=True)
class LogprobsReport:
    """How far apart the log-probabilities of two runs are."""

    max_difference: float
    mean_difference: float
    datum: int
    """Where the largest difference is: which sequence,"""
    position: int
    """and which token of it."""
    token: int
    logprob_a: float
    logprob_b: float
    num_tokens: int
    tolerance: float
    by_datum: tuple[float, ...]
    """The largest difference of each sequence."""
    how_a: str
    """What computed it."""
    how_b: str

    @property
    def same(self) -> bool:
        """Tell whether no token differs by more than the tolerance."""
        return self.max_difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {"logprobs": asdict(self), "same": self.same}


def compare_logprobs(
    a: Sequence[Any],
    b: Sequence[Any],
    data: Sequence[Datum],
    *,
    tolerance: float,
    how: tuple[str, str],
) -> LogprobsReport:
    """Compare one array per datum.  Raises ExportError for shapes that differ, or no number."""
    differences = []
    for index, (one, other, datum) in enumerate(zip(a, b, data, strict=True)):
        one, other = (np.asarray(each, dtype=np.float64) for each in (one, other))
        if not one.shape == other.shape == datum["labels"].shape:
            raise ExportError(
                f"datum {index}: shapes {one.shape} and {other.shape} must be the same"
            )
        for side, values in zip(how, (one, other), strict=True):
            if not np.isfinite(values).all():
                raise ExportError(f"datum {index}: log-probabilities are not finite: {side}")
        differences.append(np.abs(one - other))
    worst = max(range(len(data)), key=lambda index: float(differences[index].max()))
    place = int(differences[worst].argmax())
    num_tokens = sum(len(each) - 1 for each in differences)  # the first is never predicted
    return LogprobsReport(
        max_difference=float(differences[worst].max()),
        mean_difference=float(sum(each.sum() for each in differences)) / num_tokens,
        datum=worst,
        position=place,
        token=int(data[worst]["labels"][place]),
        logprob_a=float(a[worst][place]),
        logprob_b=float(b[worst][place]),
        num_tokens=num_tokens,
        tolerance=tolerance,
        by_datum=tuple(float(each.max()) for each in differences),
        how_a=how[0],
        how_b=how[1],
    )
