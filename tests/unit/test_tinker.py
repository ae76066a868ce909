"""Data of this project as Tinker's, and back."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.errors import ConfigError, DataError
from megatrain.tinker import datum_to_input_feature, input_feature_to_datum
from megatrain.types import IGNORED_LABEL

tinker = pytest.importorskip("tinker")


def _numbers(datum, name):
    return datum.loss_fn_inputs[name].to_numpy().tolist()


def test_labels_become_targets_that_are_shifted_and_weighted():
    datum = input_feature_to_datum({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]})
    assert datum.model_input.to_ints() == [5, 6, 7]
    assert _numbers(datum, "target_tokens") == [6, 7, 8]
    assert _numbers(datum, "weights") == [0.0, 1.0, 1.0]


def test_a_feature_without_labels_is_trained_on_all_its_tokens():
    datum = input_feature_to_datum({"input_ids": [5, 6, 7]})
    assert _numbers(datum, "target_tokens") == [6, 7]
    assert _numbers(datum, "weights") == [1.0, 1.0]


def test_loss_inputs_stand_at_their_labels_and_are_zero_elsewhere():
    feature = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    inputs = {"old_logps": [-1.0, -2.0], "advantages": 0.5, "clip_low_threshold": 0.9}
    datum = input_feature_to_datum(feature, loss_fn="ppo", loss_inputs=inputs)
    assert _numbers(datum, "logprobs") == [0.0, -1.0, -2.0]
    assert _numbers(datum, "advantages") == [0.0, 0.5, 0.5]
    assert _numbers(datum, "clip_low_threshold") == pytest.approx([0.9] * 3)
    assert "weights" not in datum.loss_fn_inputs


def test_gspo_counts_labels_alone_in_its_ratio():
    feature = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
    inputs = {"old_logps": 0.0, "advantages": 1.0}
    datum = input_feature_to_datum(feature, loss_fn="gspo", loss_inputs=inputs)
    assert _numbers(datum, "sequence_ratio_mask") == [0.0, 1.0]


_features = st.lists(st.integers(0, 1000), min_size=2, max_size=20).flatmap(
    lambda ids: st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)).map(
        lambda trained: {
            "input_ids": ids,
            "labels": [
                token if on and index else IGNORED_LABEL
                for index, (token, on) in enumerate(zip(ids, trained, strict=True))
            ],
        }
    )
)


@given(_features)
def test_a_feature_comes_back_as_it_was(feature):
    back, inputs = datum_to_input_feature(input_feature_to_datum(feature))
    assert back == feature
    assert inputs == {}


@given(st.lists(st.tuples(st.integers(0, 99), st.floats(-4, 4, width=32)), min_size=1))
def test_weights_other_than_0_and_1_come_back_with_the_datum(pairs):
    targets, weights = (np.array(each) for each in zip(*pairs, strict=True))
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1] * len(pairs)),
        loss_fn_inputs={"target_tokens": targets, "weights": weights.astype(np.float32)},
    )
    feature, inputs = datum_to_input_feature(datum)
    kept = np.array(feature["labels"][1:]) != IGNORED_LABEL
    assert (kept == (weights != 0)).all()
    said = inputs.get("weights", np.insert(kept.astype(np.float32), 0, 0))[1:]
    assert (said == weights).all()


def test_inputs_of_policies_come_back_under_this_project_s_names():
    feature = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    given_inputs = {"old_logps": [0.0, -1.0, -2.0], "advantages": [0.0, 1.0, 2.0]}
    datum = input_feature_to_datum(feature, loss_fn="cispo", loss_inputs=given_inputs)
    back, inputs = datum_to_input_feature(datum)
    assert back == feature
    assert {name: each.tolist() for name, each in inputs.items()} == given_inputs


@pytest.mark.parametrize(
    ("feature", "options", "said"),
    [
        ({"input_ids": [5]}, {}, "at least 2 tokens"),
        ({"input_ids": [5, 6], "labels": [5]}, {}, "as many labels"),
        ({"input_ids": [5, 6, 7, 8], "lengths": [2, 2]}, {}, "packs several"),
        ({"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}, {}, "packs several"),
        ({"input_ids": [5, 6]}, {"loss_fn": "dro"}, "cannot leave labels out"),
        ({"input_ids": [5, 6]}, {"loss_fn": "ppo"}, "needs advantages, old_logps"),
        ({"input_ids": [5, 6]}, {"loss_inputs": {"advantages": 1}}, "does not take advantages"),
        ({"input_ids": [5, 6]}, {"loss_inputs": {"weights": [1, 1, 1]}}, "must be one number"),
    ],
)
def test_what_a_datum_cannot_hold_is_refused(feature, options, said):
    with pytest.raises(DataError, match=said):
        input_feature_to_datum(feature, **options)


def test_a_datum_with_several_targets_a_position_is_no_feature():
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={"target_tokens": np.ones((2, 3), dtype=np.int64)},
    )
    with pytest.raises(DataError, match="several numbers a position"):
        datum_to_input_feature(datum)


def test_a_datum_with_an_image_is_no_feature():
    image = tinker.types.ImageChunk(data=b"x", format="png", expected_tokens=4)
    datum = tinker.Datum(model_input=tinker.ModelInput(chunks=[image]), loss_fn_inputs={})
    with pytest.raises(DataError, match="text alone"):
        datum_to_input_feature(datum)


def test_without_the_client_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tinker.types", None)
    with pytest.raises(ConfigError, match="pip install tinker"):
        input_feature_to_datum({"input_ids": [5, 6]})
