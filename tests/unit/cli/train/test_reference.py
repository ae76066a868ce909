"""What losses take beside the data: references and KTO's reference point."""

import numpy as np
import pytest

from megatrain.cli.train.mismatch import mismatch
from megatrain.cli.train.recipes import loss_of
from megatrain.cli.train.reference import LossInputs, row_key
from megatrain.errors import StateError
from megatrain.types import StepOutput
from tests.fixtures.run_config import configure


class Scripted:
    """A model that answers forward_only with the sum of each datum's ids, or twice that as base."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, int]] = []

    def forward_only(self, *, inputs, adapter_name=None):
        self.asked.append((adapter_name, len(inputs)))
        factor = 2.0 if adapter_name == "" else 1.0
        data = []
        for row in inputs:
            sides = [key for key in row if key.endswith("input_ids")]
            data += [np.float32([factor * sum(row[side])]) for side in sides]
        return StepOutput(loss=0.0, logps=data)


def pair(*ids: int) -> dict:
    row = {}
    for side, value in zip(("chosen", "rejected"), ids, strict=True):
        row |= {f"{side}_input_ids": [value], f"{side}_labels": [value]}
    return row


def test_the_reference_of_a_row_is_computed_once_and_given_in_the_order_of_the_batch():
    model, loss = Scripted(), loss_of(configure(recipe="dpo"))
    inputs = LossInputs(model, loss, max_length=8)
    assert [float(v) for (v,) in inputs([pair(1, 2), pair(3, 4)])["ref_logps"]] == [2, 4, 6, 8]
    assert [float(v) for (v,) in inputs([pair(3, 4), pair(5, 6)])["ref_logps"]] == [6, 8, 10, 12]
    assert model.asked == [("", 2), ("", 1)]


def test_a_whole_model_has_no_reference_after_its_first_step():
    inputs = LossInputs(Scripted(), loss_of(configure(recipe="dpo")), max_length=8)
    inputs.prepare([[[pair(1, 2)]]])
    assert len(inputs([pair(1, 2)])["ref_logps"]) == 2
    with pytest.raises(StateError, match="no reference"):
        inputs([pair(3, 4)])


def test_a_prompt_is_given_the_answer_of_another_row():
    row = {"input_ids": [1, 2, 3, 9], "labels": [-100, -100, -100, 9]}
    other = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    found = mismatch(row, other, 8)
    assert found["input_ids"].tolist() == [1, 2, 3, 6, 7]
    assert found["labels"].tolist() == [-100, -100, -100, 6, 7]
    assert mismatch(row, other, 4)["input_ids"].tolist() == [1, 2, 3, 6]


def rated(prompt: int, answer: int) -> dict:
    return {"input_ids": [prompt, answer], "labels": [-100, answer], "label": True}


def test_a_whole_model_compares_with_the_row_before_in_the_order_of_the_data():
    """Policy minus reference is minus the sum of ids: of (1, 4), (2, 1), (3, 2), (4, 3) here."""
    rows = [rated(n, n) for n in (1, 2, 3, 4)]
    model = Scripted()
    inputs = LossInputs(model, loss_of(configure(recipe="kto")), max_length=8)
    inputs.prepare([[rows[:3], rows[3:]]])
    model.asked.clear()
    assert inputs([rows[2], rows[0]])["kl"] == [-5.0, -5.0]
    assert inputs([rows[3]])["kl"] == [-7.0]
    assert model.asked == [(None, 2), (None, 1)]  # the reference is not needed any more
    with pytest.raises(StateError, match="no reference"):
        inputs([rated(9, 9)])


def test_what_is_kept_of_a_stream_is_bounded():
    model, loss = Scripted(), loss_of(configure(recipe="dpo"))
    inputs = LossInputs(model, loss, max_length=8, max_values=4)
    for number in (1, 2, 1, 3, 1, 2):
        inputs([pair(number, number)])
    assert len(model.asked) == 4  # 1, 2, 3, and 2 again, which was not used for longest
    inputs.prepare([[[pair(1, 1), pair(2, 2), pair(3, 3), pair(4, 4)]]])
    assert len(inputs([pair(1, 1), pair(4, 4)])["ref_logps"]) == 4


def test_the_reference_point_is_the_mean_over_answers_to_other_prompts():
    """Policy minus reference is minus the sum of ids: of (1, 20) and (10, 2) here."""
    rows = [
        {"input_ids": [1, 2], "labels": [-100, 2], "label": True},
        {"input_ids": [10, 20], "labels": [-100, 20], "label": False},
    ]
    inputs = LossInputs(Scripted(), loss_of(configure(recipe="kto")), max_length=8)(rows)
    assert inputs["kl"] == [-16.5, -16.5]


def test_rows_have_the_same_key_if_they_have_the_same_tokens_and_labels():
    row = {"input_ids": [1, 2], "labels": [-100, 2]}
    assert row_key(row) == row_key({**row, "length": 2})
    assert row_key(row) != row_key({**row, "labels": [1, 2]})
