"""From rows of a template to what a model takes."""

from collections.abc import Mapping

import pytest

from megatrain.data.input_processor import InputProcessor
from megatrain.data.pair_row import PairRow
from megatrain.errors import DataError


class Unread(Mapping):
    """A LazyRow whose content must not be touched."""

    key, num_tokens, num_labels, numbers = "row 7", 5, 3, ()

    def _refuse(self, *unused):
        raise AssertionError("the row was read")

    __getitem__ = __iter__ = __len__ = _refuse


def test_the_conversation_is_left_out_and_inputs_of_losses_stay():
    row = {"input_ids": [1, 2], "labels": [-100, 2], "length": 2, "messages": [], "label": False}
    packed = {"input_ids": [1], "labels": [1], "lengths": [1], "position_ids": [0], "user_data": 1}
    bare = {"input_ids": [1], "labels": None, "weights": [0.5]}
    assert InputProcessor()([row, packed, bare]) == [
        {"input_ids": [1, 2], "labels": [-100, 2], "length": 2, "label": False},
        {"input_ids": [1], "labels": [1], "lengths": [1], "position_ids": [0]},
        {"input_ids": [1], "weights": [0.5]},
    ]


def test_a_pair_becomes_chosen_then_rejected():
    pair = {
        "chosen_input_ids": [1, 2],
        "chosen_labels": [-100, 2],
        "rejected_input_ids": [1, 3],
        "rejected_labels": [-100, 3],
        "length": 4,
    }
    assert InputProcessor()([pair, {"input_ids": [9]}]) == [
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {"input_ids": [1, 3], "labels": [-100, 3]},
        {"input_ids": [9]},
    ]


def test_a_lazy_row_is_passed_on_unread():
    row = Unread()
    processed = InputProcessor()([row])
    assert len(processed) == 1
    assert processed[0] is row


def test_a_pair_that_is_not_read_becomes_two_data_that_are_read_once():
    reads = []
    pair = {
        "chosen_input_ids": [1, 2, 3],
        "chosen_labels": [-100, 2, 3],
        "rejected_input_ids": [1, 4],
        "rejected_labels": [-100, 4],
    }
    row = PairRow(
        lambda: reads.append(1) or pair,
        key="k",
        num_tokens=5,
        num_labels=3,
        numbers=["chosen_ref_logps", "label"],
        chosen=(3, 2),
    )
    chosen, rejected = InputProcessor()([row])
    assert [list(side.numbers) for side in (chosen, rejected)] == [["ref_logps"], []]
    assert [(side.num_tokens, side.num_labels) for side in (chosen, rejected)] == [(3, 2), (2, 1)]
    assert chosen.key != rejected.key
    assert reads == []
    assert dict(chosen) == {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    assert dict(rejected) == {"input_ids": [1, 4], "labels": [-100, 4]}
    assert reads == [1]


def test_a_row_that_was_not_encoded_is_named():
    with pytest.raises(DataError, match="row 1 is not encoded: it has messages, tools"):
        InputProcessor()([{"input_ids": [1]}, {"messages": [], "tools": None}])


class Reversed(InputProcessor):
    def __call__(self, rows):
        return super().__call__(list(rows)[::-1])


def test_a_subclass_may_do_more():
    assert Reversed()([{"input_ids": [1]}, {"input_ids": [2]}])[0] == {"input_ids": [2]}
