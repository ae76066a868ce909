"""asample on the wire, against the client's own models and decoder."""

import json

import numpy as np
import pytest
import tinker
import torch
from pydantic import ValidationError
from tinker.proto.response_conv import deserialize_sample_response
from tinker.types._pydantic_types.tensor_data import TensorData
from tinker.types.sample_request import SampleRequest as TheirRequest

from megatrain.config.service import Limits
from megatrain.errors import DataError
from megatrain.sampler.types import NOTHING, SampledSequence, SampleResult, TopK
from megatrain.service.wire.sampling import encode_sample_result, to_sample_request
from megatrain.service.wire.schema import SampleBody

LIMITS = Limits(max_samples=8, max_new_tokens=16, max_targets=4)


def _sent(tokens=(1, 2, 3), stop=None, *, params=None, **more) -> SampleBody:
    """Return what the client's own request becomes on the wire."""
    request = TheirRequest(
        prompt=tinker.ModelInput.from_ints(list(tokens)),
        sampling_params=tinker.SamplingParams(stop=stop, **({"max_tokens": 5} | (params or {}))),
        sampling_session_id="s:sample:0",
        seq_id=10**18,
        **more,
    )
    return SampleBody.model_validate(json.loads(request.model_dump_json(exclude_none=True)))


def _read(body, vocab_size=100, max_context_length=32):
    return to_sample_request(
        body, LIMITS, vocab_size=vocab_size, max_context_length=max_context_length, adapter="a"
    )


def test_all_that_a_client_asks_arrives():
    body = _sent(
        params={"temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 3},
        num_samples=2,
        prompt_logprobs=True,
        prompt_logprobs_last_n=2,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=4,
        prompt_alt_tokens_k=1,
        record_stability_info=True,
    )
    assert body.seq_id == 10**18
    request = _read(body)
    assert request.prompt == (1, 2, 3)
    assert request.adapter == "a"
    assert (request.num_samples, request.max_tokens, request.temperature) == (2, 5, 0.5)
    assert (request.top_k, request.top_p, request.seed) == (7, 0.9, 3)
    assert request.prompt_logprobs
    assert request.prompt_logprobs_last_n == 2
    assert (request.topk_prompt_logprobs, request.topk_sample_logprobs) == (3, 4)
    assert request.prompt_alt_tokens_k == 1


@pytest.mark.parametrize(
    ("stop", "read"),
    [(None, None), ([], ()), ("a", ("a",)), (["a", "b"], ("a", "b")), ([7, 8], (7, 8))],
)
def test_stops_mean_what_the_client_means(stop, read):
    assert _read(_sent(stop=stop)).stop == read


def test_without_max_tokens_there_is_as_much_as_fits():
    body = _sent(params={"max_tokens": None})
    assert _read(body, max_context_length=10).max_tokens == 7
    assert _read(body, max_context_length=1000).max_tokens == LIMITS.max_new_tokens


@pytest.mark.parametrize("seed", [-1, 1 << 63, (1 << 64) - 1])
def test_seeds_of_64_bits_are_folded(seed):
    read = _read(_sent(params={"seed": seed})).seed
    assert read is not None
    assert 0 <= read < 1 << 63


def test_targets_may_be_dense_or_sparse():
    dense = np.int64([[4, -1], [-1, 5]])
    request = _read(_sent(target_prompt_logprobs=TensorData.from_numpy(dense)))
    assert request.target_prompt_tokens is not None
    assert request.target_prompt_tokens.tolist() == dense.tolist()
    sparse = TensorData.from_torch_sparse(
        torch.full((2, 4), -1).index_put((torch.tensor([1]), torch.tensor([3])), torch.tensor(0)),
        pad_value=-1,
    )
    assert sparse.sparse_crow_indices == [0, 0, 1]
    request = _read(_sent(target_prompt_logprobs=sparse))
    assert request.target_prompt_tokens is not None
    assert request.target_prompt_tokens.tolist() == [[-1] * 4, [-1, -1, -1, 0]]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (_sent(tokens=[]), "empty"),
        (_sent(tokens=[100]), "token 100, and the vocabulary has 100"),
        (_sent(tokens=[1] * 32), "leaves no room"),
        (_sent(tokens=[1] * 30), "longer than the context of 32"),
        (_sent(params={"max_tokens": 17}), "max_tokens must be from 1 to 16"),
        (_sent(params={"max_tokens": 0}), "max_tokens must be from 1 to 16"),
        (_sent(num_samples=9), "num_samples must be from 1 to 8"),
        (_sent(topk_prompt_logprobs=5), "topk_prompt_logprobs must be from 0 to 4"),
        (_sent(prompt_alt_tokens_k=5), "prompt_alt_tokens_k must be from 0 to 4"),
        (_sent(prompt_logprobs_last_n=1), "needs prompt_logprobs"),
        (_sent(prompt_logprobs=True, prompt_logprobs_last_n=3), "must be from 1 to 2"),
        (_sent(stop=[100]), "stop holds token 100"),
        (_sent(stop=["a", ""]), "must not be empty"),
        (
            _sent(target_prompt_logprobs=TensorData(data=[1, 2], dtype="int64", shape=[1, 2])),
            "must have shape [2, K]",
        ),
        (
            _sent(target_prompt_logprobs=TensorData(data=[1, 100], dtype="int64", shape=[2, 1])),
            "holds token 100",
        ),
    ],
)
def test_what_a_sampler_cannot_do_is_refused_in_a_sentence(body, said):
    with pytest.raises(DataError) as caught:
        _read(body)
    assert said in str(caught.value)


def test_images_in_a_prompt_are_refused_by_name():
    image = tinker.types.ImageChunk(data=b"png", format="png", expected_tokens=2)
    prompt = tinker.ModelInput(chunks=[image])
    sent = json.loads(prompt.model_dump_json(exclude_none=True))
    with pytest.raises(DataError, match=r"reads text alone.*image"):
        _read(SampleBody.model_validate({"prompt": sent}))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"max_tokens": 10**12},
        {"stop": [None]},
        {"stop": ["a", 1]},
        {"seed": 10**30},
    ],
)
def test_numbers_out_of_bounds_are_refused(params):
    with pytest.raises(ValidationError):
        SampleBody.model_validate({"prompt": {"chunks": []}, "sampling_params": params})


def test_keys_that_a_newer_client_adds_are_passed_over():
    body = {"prompt": {"chunks": [{"tokens": [1], "new": 1}], "new": 2}, "new": 3}
    assert _read(SampleBody.model_validate(body)).prompt == (1,)


def _sequence(tokens, reason="stop", topk=None):
    return SampledSequence(tokens, np.float32([-0.5] * len(tokens)), reason, topk)


def test_results_arrive_as_they_are():
    topk = TopK(np.int32([[5, 6], [7, 0]]), np.float32([[-0.5, -1], [-2, NOTHING]]))
    prompt = np.float32([np.nan, -1, -2])
    result = SampleResult(
        sequences=[_sequence([5, 7], topk=topk), _sequence([9], "length")],
        prompt_logprobs=prompt,
        prompt_topk=TopK(
            np.int32([[0, 0], [3, 4], [5, 6]]),
            np.float32([[NOTHING, NOTHING], [-1, -2], [-3, -4]]),
        ),
        target_prompt_logprobs=np.float32([[-1, np.nan], [np.nan, -2]]),
        prompt_alt_tokens=np.int32([[1], [2]]),
        prompt_alt_logprobs=np.float32([[-1], [-2]]),
        prompt_cache_hit_tokens=2,
    )
    read = deserialize_sample_response(encode_sample_result(result))
    assert [each.tokens for each in read.sequences] == [[5, 7], [9]]
    assert [each.stop_reason for each in read.sequences] == ["stop", "length"]
    assert read.sequences[0].logprobs == [-0.5, -0.5]
    assert read.sequences[0].topk_logprobs == [[(5, -0.5), (6, -1.0)], [(7, -2.0)]]
    assert read.sequences[1].topk_logprobs is None
    assert read.prompt_logprobs == [None, -1.0, -2.0]
    assert read.topk_prompt_logprobs == [None, [(3, -1.0), (4, -2.0)], [(5, -3.0), (6, -4.0)]]
    assert read.target_prompt_logprobs is not None
    np.testing.assert_array_equal(
        read.target_prompt_logprobs.to_numpy(), result.target_prompt_logprobs
    )
    assert read.prompt_alt_tokens is not None
    assert read.prompt_alt_tokens.tokens.tolist() == [[1], [2]]
    assert read.prompt_alt_tokens.logprobs.tolist() == [[-1], [-2]]
    assert read.prompt_cache_hit_tokens == 2


def test_a_result_without_extras_has_none():
    read = deserialize_sample_response(encode_sample_result(SampleResult([_sequence([1])])))
    assert read.prompt_logprobs is None
    assert read.topk_prompt_logprobs is None
    assert read.target_prompt_logprobs is None
    assert read.prompt_alt_tokens is None


def test_a_sparse_question_gets_a_sparse_answer():
    body = _sent(
        target_prompt_logprobs=TensorData(
            data=[4, 5],
            dtype="int64",
            shape=[2, 3],
            sparse_crow_indices=[0, 1, 2],
            sparse_col_indices=[2, 0],
        )
    )
    scores = np.full((2, 3), np.nan, np.float32)
    scores[0, 2], scores[1, 0] = -1, -2
    result = SampleResult([_sequence([1])], target_prompt_logprobs=scores)
    data = encode_sample_result(result, body.target_prompt_logprobs)
    read = deserialize_sample_response(data).target_prompt_logprobs
    assert read is not None
    assert read.data == [-1, -2]
    assert (read.shape, read.sparse_crow_indices) == ([2, 3], [0, 1, 2])
    assert read.sparse_col_indices == [2, 0]
