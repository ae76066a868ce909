"""Statistics of lengths, against numbers worked out by hand."""

import numpy as np
import pytest

from megatrain.data.statistics import DatasetStatistics
from megatrain.errors import DataError


def test_numbers_of_rows_that_are_not_packed() -> None:
    lengths = np.arange(1, 102)
    statistics = DatasetStatistics.of(lengths, lengths - 1, max_length=200)
    assert statistics.num_rows == 101
    assert statistics.num_tokens == 5151
    assert statistics.num_labels == 5050
    assert statistics.mean_length == 51
    assert statistics.percentiles == {0: 1, 5: 6, 25: 26, 50: 51, 75: 76, 95: 96, 99: 100, 100: 101}
    assert statistics.fill_rate is None


def test_the_fill_rate_counts_packed_rows_against_their_limit() -> None:
    statistics = DatasetStatistics.of(
        np.array([100, 50]), np.array([60, 20]), max_length=100, num_samples=9
    )
    assert statistics.fill_rate == 0.75
    assert statistics.num_samples == 9


def test_no_rows_have_no_statistics() -> None:
    with pytest.raises(DataError, match="no rows"):
        DatasetStatistics.of(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
