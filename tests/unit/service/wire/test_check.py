"""Passes that ranks could not do are refused in one sentence."""

import numpy as np
import pytest

from megatrain.config.service import Limits
from megatrain.errors import DataError
from megatrain.service.wire.check import check_pass
from megatrain.service.wire.types import Datum, PassRequest

LIMITS = Limits(max_data=4, max_targets=3, max_request_tokens=20)
NAN = float("nan")


def _floats(*values):
    return np.float32(values)


def _inputs(loss_fn="cross_entropy", **more):
    inputs = {"target_tokens": np.int64([2, 3, 4])}
    if loss_fn != "cross_entropy":
        inputs |= {"logprobs": _floats(-1, -1, -1), "advantages": _floats(0, 1, -1)}
    return {name: value for name, value in (inputs | more).items() if value is not None}


def _request(loss_fn="cross_entropy", config=None, tokens=(1, 2, 3), num_data=1, **more):
    datum = Datum(np.int64(tokens), _inputs(loss_fn, **more))
    return PassRequest("run", 1, [datum] * num_data, loss_fn, config or {})


def _check(request):
    check_pass(request, LIMITS, vocab_size=10, max_context_length=5)


def _refused(request) -> str:
    with pytest.raises(DataError) as caught:
        _check(request)
    assert "\n" not in caught.value.message
    return str(caught.value)


@pytest.mark.parametrize(
    ("loss_fn", "config", "more"),
    [
        ("cross_entropy", {}, {}),
        ("cross_entropy", {}, {"weights": _floats(-1e6, 0, 0.5)}),
        (
            "cross_entropy",
            {},
            {"target_tokens": np.ones((3, 2), np.int64), "weights": np.ones((3, 2), np.float32)},
        ),
        ("importance_sampling", {}, {}),
        ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}, {}),
        ("ppo", {}, {"clip_low_threshold": _floats(0.5), "clip_high_threshold": _floats(1, 2, 3)}),
        ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}, {}),
        ("dro", {"beta": 0.05}, {}),
        ("gspo", {"clip_high_threshold": 1.01}, {"sequence_ratio_mask": _floats(0, 1, 1)}),
    ],
)
def test_what_the_api_describes_is_allowed(loss_fn, config, more):
    _check(_request(loss_fn, config, **more))


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (_request("stable_reinforce"), 'loss_fn="importance_sampling"'),
        (_request("custom"), "forward_backward_custom evaluates them on the client"),
        (_request("nonsense"), "'nonsense' is not known"),
        (_request(num_data=0), "1 to 4 data"),
        (_request(num_data=5), "1 to 4 data"),
        (_request(tokens=[]), "0 tokens; this model takes 1 to 5"),
        (_request(tokens=[1] * 6), "6 tokens; this model takes 1 to 5"),
        (_request(tokens=[1, 2, 10]), "token 10, and the vocabulary has 10"),
        (_request(tokens=[1, -1, 2]), "token -1"),
        (_request(target_tokens=np.int64([1, 2, 10])), "target_tokens of datum 0 holds token 10"),
        (_request(target_tokens=None), "needs target_tokens"),
        (_request(target_tokens=_floats(1, 2, 3)), "must be int64"),
        (_request(target_tokens=np.int64([1, 2])), "shape [2], and the input has 3 tokens"),
        (_request(target_tokens=np.ones((3, 4), np.int64)), "4 columns, not 1 to 3"),
        (_request(target_tokens=np.ones((3, 0), np.int64)), "0 columns"),
        (_request("ppo", target_tokens=np.ones((3, 2), np.int64)), "one target a position"),
        (_request(weights=_floats(1, 2)), "weights of datum 0 has shape [2]"),
        (_request(weights=np.ones((3, 1), np.float32)), "shape [3, 1]"),
        (_request(weights=_floats(1, NAN, 2)), "not finite"),
        (_request(weights=_floats(1, np.inf, 2)), "not finite"),
        (_request(advantages=_floats(1, 2, 3)), "does not take 'advantages'"),
        (_request("ppo", advantages=None), "needs advantages"),
        (_request("ppo", logprobs=None), "needs logprobs"),
        (_request("ppo", weights=_floats(1, 1, 1)), "does not take 'weights'"),
        (_request("ppo", clip_low_threshold=_floats(-1)), "below 0"),
        (
            _request("ppo", clip_low_threshold=_floats(2), clip_high_threshold=_floats(1)),
            "above its clip_high_threshold",
        ),
        (_request("ppo", {"beta": 0.1}), "no option 'beta'; it has: clip_low_threshold"),
        (_request("dro", {"beta": -1.0}), "beta of dro must be from 0"),
        (_request("dro", {"beta": NAN}), "beta of dro must be from 0"),
        (_request("dro", {"beta": "much"}), "not 'much'"),
        (
            _request("ppo", {"clip_low_threshold": 2.0, "clip_high_threshold": 1.0}),
            "is above clip_high_threshold 1",
        ),
    ],
)
def test_the_reason_of_a_refusal_is_named(request_, said):
    assert said in _refused(request_)


def test_a_request_has_a_bound_on_all_its_tokens():
    datum = Datum(np.ones(5, np.int64), {"target_tokens": np.ones(5, np.int64)})
    limits = Limits(max_request_tokens=14)
    request = PassRequest("run", 1, [datum] * 3, "cross_entropy")
    with pytest.raises(DataError, match="15 tokens in one request"):
        check_pass(request, limits, vocab_size=10, max_context_length=5)


def test_numbers_in_the_sequence_begin_at_1():
    request = PassRequest("run", 0, _request().data, "cross_entropy")
    assert "seq_id" in _refused(request)
