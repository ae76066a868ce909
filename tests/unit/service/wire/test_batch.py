"""Passes as the ranks take them, and their outputs as clients read them."""

import math

import numpy as np
import pytest
import torch
from tinker.lib.chunked_fwdbwd_helpers import combine_fwd_bwd_output_results
from tinker.proto.response_conv import deserialize_forward_backward_output

from megatrain.config.service import Limits
from megatrain.errors import DataError
from megatrain.service.wire.batch import DEFAULT_BOUNDS, from_output, to_batch
from megatrain.service.wire.losses import LOSSES
from megatrain.service.wire.passes import encode_pass_result
from megatrain.service.wire.types import Datum, PassRequest
from megatrain.train.loss_inputs import check_names
from megatrain.train.losses.make import make_loss
from megatrain.types import IGNORED_LABEL, StepOutput


def _datum(*targets, **inputs):
    return Datum(
        np.arange(len(targets), dtype=np.int64),
        {"target_tokens": np.int64(targets)}
        | {name: np.float32(value) for name, value in inputs.items()},
    )


def _request(*data, loss_fn="cross_entropy", config=None):
    return PassRequest("run", 1, data, loss_fn, config or {})


def _policy(*targets, **inputs):
    zeros = [0.0] * len(targets)
    return _datum(*targets, **{"logprobs": zeros, "advantages": zeros, **inputs})


def test_targets_become_labels_that_the_ranks_shift_back():
    batch = to_batch(_request(_datum(7, 8, 9)), "adapter")
    assert batch.adapter == "adapter"
    (feature,) = batch.inputs
    assert feature["input_ids"].tolist() == [0, 1, 2, 9]
    assert feature["labels"].tolist() == [IGNORED_LABEL, 7, 8, 9]
    assert batch.loss == ("cross_entropy", {"reduction": "sum"})


def test_without_weights_every_target_counts_once():
    batch = to_batch(_request(_datum(7, 8), _datum(9, weights=[-2.0])), "a")
    assert [each.tolist() for each in batch.loss_inputs["weights"]] == [[1.0, 1.0], [-2.0]]


def test_a_bound_of_a_datum_stands_for_all_its_targets_and_others_have_the_option_s():
    data = _policy(7, 8, clip_low_threshold=[0.5]), _policy(9)
    batch = to_batch(_request(*data, loss_fn="ppo", config={"clip_low_threshold": 0.7}), "a")
    low = batch.loss_inputs["clip_low_threshold"]
    assert [each.tolist() for each in low] == [[0.5, 0.5], [pytest.approx(0.7)]]
    assert "clip_high_threshold" not in batch.loss_inputs
    batch = to_batch(_request(*data, loss_fn="ppo"), "a")
    assert batch.loss_inputs["clip_low_threshold"][1].tolist() == [pytest.approx(0.8)]


@pytest.mark.parametrize("name", DEFAULT_BOUNDS)
def test_bounds_that_are_filled_in_are_the_ranks_own(name):
    loss = make_loss(name, {})
    assert (loss.clip_low_threshold, loss.clip_high_threshold) == DEFAULT_BOUNDS[name]


@pytest.mark.parametrize("name", LOSSES)
def test_the_ranks_take_what_they_are_sent(name):
    loss = LOSSES[name]
    inputs = {each: [1.0] for each in loss.required | loss.optional}
    config = dict.fromkeys(loss.options, 1.0)
    batch = to_batch(_request(_datum(7, **inputs), loss_fn=name, config=config), "a")
    assert batch.loss is not None
    made = make_loss(*batch.loss)
    assert made.is_sum
    check_names(made, batch.loss_inputs)
    needed = {each for each, spec in made.inputs.items() if spec.required}
    assert needed <= batch.loss_inputs.keys()


def test_several_targets_a_position_become_as_many_data():
    wide = Datum(
        np.int64([1, 2]),
        {
            "target_tokens": np.int64([[1, 2, 3], [4, 5, 6]]),
            "weights": np.float32([[1, 0, 0], [0, 0, 1]]),
        },
    )
    request = _request(wide, _datum(7))
    batch = to_batch(request, "a")
    assert [each["labels"].tolist()[1:] for each in batch.inputs] == [[1, 4], [2, 5], [3, 6], [7]]
    weights = [each.tolist() for each in batch.loss_inputs["weights"]]
    assert weights == [[1, 0], [0, 0], [0, 1], [1]]
    rows = [np.float32([0, -a, -b]) for a, b in ((1, 4), (2, 5), (3, 6))]
    output = StepOutput(loss=1.0, logps=[*rows, np.float32([0, -7])])
    outputs = from_output(request, output).outputs
    assert outputs[0]["logprobs"].tolist() == [[-1, -2, -3], [-4, -5, -6]]
    assert outputs[1]["logprobs"].tolist() == [-7]


def test_one_target_a_position_may_stand_in_a_column():
    column = Datum(
        np.int64([1, 2]),
        {"target_tokens": np.int64([[3], [4]]), "weights": np.float32([[1], [0.5]])},
    )
    request = _request(column, _datum(7))
    batch = to_batch(request, "a")
    assert [each.tolist() for each in batch.loss_inputs["weights"]] == [[1, 0.5], [1]]
    assert batch.loss_inputs.keys() == {"weights"}
    output = StepOutput(loss=1.0, logps=[np.float32([0, -1, -2]), np.float32([0, -3])])
    outputs = from_output(request, output).outputs
    assert [each["logprobs"].tolist() for each in outputs] == [[[-1], [-2]], [-3]]


def test_log_probabilities_have_the_shape_of_their_targets():
    request = _request(_datum(7, 8), _datum(9))
    output = StepOutput(loss=1.0, logps=[np.float32([0, -1, -2]), np.float32([0, -3])])
    result = from_output(request, output)
    assert [each["logprobs"].tolist() for each in result.outputs] == [[-1, -2], [-3]]


def test_the_loss_is_a_sum_whatever_it_was_divided_by():
    request = _request(_datum(7, 8))
    logps = [np.float32([0, -1, -2])]
    for loss, divisor in ((3.0, 1.0), (1.5, 2.0)):
        result = from_output(request, StepOutput(loss=loss, logps=logps, divisor=divisor))
        assert result.metrics["loss:sum"] == 3.0
        assert result.metrics["tokens:sum"] == 2.0


def test_a_loss_that_is_no_number_is_the_client_s_error():
    output = StepOutput(loss=math.nan, logps=[np.float32([0, 0])])
    with pytest.raises(DataError, match="not finite"):
        from_output(_request(_datum(7)), output)


def test_the_client_combines_our_metrics_over_its_requests():
    """Each key must have exactly one colon, or the client raises."""
    statistics = {
        "token_accuracy": 0.5,
        "clip_ratio/low_mean": 0.25,
        "e_max_violation:max": 2.0,
        "odd:name": 1.0,
        "no_number": math.nan,
    }
    output = StepOutput(loss=2.0, logps=[np.float32([0, -1])], statistics=statistics)
    result = from_output(_request(_datum(7)), output)
    assert all(name.count(":") == 1 for name in result.metrics)
    read = deserialize_forward_backward_output(encode_pass_result(result))
    combined = combine_fwd_bwd_output_results([read, read])
    assert combined.metrics["loss:sum"] == 4.0
    assert combined.metrics["token_accuracy:mean"] == 0.5
    assert combined.metrics["e_max_violation:max"] == 2.0
    assert not any("no_number" in name for name in combined.metrics)
    assert len(combined.loss_fn_outputs) == 2


def test_a_pass_of_the_client_survives_the_way_to_the_loss():
    """Weights of any sign, a gradient in disguise, through the ranks' own loss."""
    from megatrain.train.loss import LossBatch

    batch = to_batch(_request(_datum(7, 8, weights=[-2.0, 3.0])), "a")
    assert batch.loss is not None
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    weights = torch.from_numpy(batch.loss_inputs["weights"][0])
    where = torch.zeros(2, dtype=torch.int64)
    loss, _ = make_loss(*batch.loss)(LossBatch(logps, where, 1, {"weights": weights}))
    loss.backward()
    assert loss.item() == 4.0  # 2 * -1 - 3 * -2
    assert logps.grad is not None
    assert logps.grad.tolist() == [2.0, -3.0]


def test_limits_have_room_for_what_the_client_sends_at_once():
    assert Limits().max_data >= 1024
    assert Limits().max_body_bytes >= 5_000_000
