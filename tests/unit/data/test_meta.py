"""What a DatasetMeta says, and what it refuses to say."""

from typing import Any

import pytest

from megatrain.data.meta import DatasetMeta
from megatrain.errors import ConfigError, DataError


def test_the_default_subset_is_none() -> None:
    assert DatasetMeta("a/b").subset is None
    assert DatasetMeta("a/b", "main", "test").describe() == "a/b/main[test]"


@pytest.mark.parametrize(
    ("data_slice", "chosen"),
    [
        (None, None),
        (range(2, 100), [2, 3, 4]),
        (range(7, 9), []),
        (range(4, -1, -2), [4, 2, 0]),
        (slice(1, -1), [1, 2, 3]),
        ([-1, 0], [4, 0]),
    ],
)
def test_rows_are_chosen_by_number(data_slice: Any, chosen: list[int] | None) -> None:
    rows = DatasetMeta("a", data_slice=data_slice).chosen_rows(5)
    assert rows is None if chosen is None else list(rows or ()) == chosen


def test_numbers_may_be_given_once_and_are_kept() -> None:
    meta = DatasetMeta("a", data_slice=(number for number in (1, 2)))
    assert meta.data_slice == (1, 2)
    assert meta == DatasetMeta("a", data_slice=[1, 2])


def test_what_is_no_choice_of_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a range, a slice or row numbers: got '10'"):
        DatasetMeta("a", data_slice="10")  # type: ignore[arg-type]
    for wrong in ([0, 1.5], [True], slice(0.0, 2), ["1"]):
        with pytest.raises(ConfigError, match="made of whole numbers"):
            DatasetMeta("a", data_slice=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dataset_id is empty"):
        DatasetMeta(" ")
    with pytest.raises(DataError, match="asks for row -6"):
        DatasetMeta("a", data_slice=[-6]).chosen_rows(5)
