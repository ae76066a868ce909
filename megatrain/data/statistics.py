"""How many rows, tokens and labels there are, how long rows are, and how full packed rows."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from megatrain.errors import DataError

Ints = npt.NDArray[np.int64]

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True, slots=True)
class DatasetStatistics:
    """Numbers of an encoded dataset; lengths are in tokens."""

    num_rows: int
    num_tokens: int
    num_labels: int
    """Labels that are predicted: neither -100 nor a sample's first token."""
    mean_length: float
    percentiles: dict[int, float]
    """Percent -> the length that so many rows do not exceed: 0 is the shortest, 100 the longest."""
    max_length: int | None = None
    """The template's limit."""
    num_samples: int | None = None
    """Samples in the packed rows; None where rows are not packed."""
    fill_rate: float | None = None
    """Share of num_rows * max_length that holds tokens; None where rows are not packed."""

    @classmethod
    def of(
        cls,
        lengths: Ints,
        num_labels: Ints,
        *,
        max_length: int | None = None,
        num_samples: int | None = None,
    ) -> Self:
        """Compute them from each row's tokens and labels; `num_samples` says that it is packed."""
        if not len(lengths):
            raise DataError("there are no rows", hint="check the filters and the data's slice")
        num_tokens = int(lengths.sum())
        is_packed = num_samples is not None and max_length is not None
        quantiles = np.percentile(lengths, PERCENTILES)
        return cls(
            num_rows=len(lengths),
            num_tokens=num_tokens,
            num_labels=int(num_labels.sum()),
            mean_length=num_tokens / len(lengths),
            percentiles=dict(zip(PERCENTILES, quantiles.tolist(), strict=True)),
            max_length=max_length,
            num_samples=num_samples,
            fill_rate=num_tokens / (len(lengths) * (max_length or 1)) if is_packed else None,
        )
