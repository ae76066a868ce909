"""Rows that are read when they are used."""

from megatrain.data.lazy_row import Row


def test_a_row_shows_its_sizes_and_once_it_is_read_its_content():
    row = Row(lambda: {"input_ids": [1, 2]}, key="0a", num_tokens=2, num_labels=1)
    sizes = "key='0a', num_tokens=2, num_labels=1"
    assert repr(row) == f"Row({sizes})"
    assert not row.is_read  # looking at it does not read it
    assert row["input_ids"] == [1, 2]
    assert repr(row) == f"Row({sizes}, content={{'input_ids': [1, 2]}})"
