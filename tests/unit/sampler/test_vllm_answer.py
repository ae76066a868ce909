"""Reading vLLM's own answers, as they were recorded."""

import base64
import io
import json

import numpy as np
import pytest

from megatrain.errors import SamplerError
from megatrain.sampler.types import NOTHING, SampleRequest
from megatrain.sampler.vllm import prompt
from megatrain.sampler.vllm.answer import pairs_of, piece, reason_of, sequences, table
from megatrain.sampler.vllm.client import LostError, said_in
from tests.fixtures.vllm.server import recorded

PROMPT = (20, 21, 22)


def test_sequences_have_their_tokens_and_log_probabilities():
    first, second = sequences(recorded("sample.json"), 0)
    assert (first.tokens, second.tokens) == ([496, 11, 155], [206, 11, 284])
    assert first.stop_reason == "length"
    assert first.topk is None
    np.testing.assert_allclose(first.logprobs, [-0.66353261, -0.63178378, -0.69458693])


def test_tables_are_sorted_and_leave_out_what_could_not_be_drawn():
    first, _ = sequences(recorded("sample.json"), 3)
    assert first.topk is not None
    assert first.topk.tokens.tolist() == [[496, 206, 0], [11, 206, 0], [305, 155, 0]]
    assert first.topk.logprobs[:, 2].tolist() == [NOTHING] * 3
    np.testing.assert_allclose(first.topk.logprobs[2, :2], [-0.69170945, -0.69458693])


def test_prompts_are_read_with_their_own_tokens_and_the_most_likely_ones():
    asked = SampleRequest(prompt=PROMPT, prompt_logprobs=True, topk_prompt_logprobs=2)
    fields = prompt.own_fields(asked, prompt.own_of(asked, recorded("prompt.json")))
    np.testing.assert_allclose(fields["prompt_logprobs"], [np.nan, -6.19867086, -6.31605291])
    assert fields["prompt_topk"].tokens.tolist() == [[0, 0], [284, 166], [178, 284]]


def test_the_last_tokens_of_a_prompt_alone_are_read_if_that_is_asked_for():
    asked = SampleRequest(prompt=PROMPT, prompt_logprobs=True, prompt_logprobs_last_n=1)
    fields = prompt.own_fields(asked, prompt.own_of(asked, recorded("prompt.json")))
    np.testing.assert_allclose(fields["prompt_logprobs"], [np.nan, np.nan, -6.31605291])


def test_tokens_that_are_named_are_found_beside_the_one_that_was_drawn():
    position = recorded("ids.json")["choices"][0]["logprobs"]["content"][0]
    found = dict(pairs_of(position))
    assert found[5] == pytest.approx(-6.55470752)
    assert found[300] == pytest.approx(-6.72519207)
    assert found[225] == pytest.approx(-6.59243869)


def test_target_tokens_are_read_from_an_array():
    targets = np.array([[5, -1], [7, 9]], np.int64)
    with io.BytesIO() as buffer:
        np.save(buffer, np.array([[-1.0, -np.inf], [-2.0, -3.0]], np.float32))
        said = base64.b64encode(buffer.getvalue()).decode()
    found = prompt.targets_of(targets, {"prompt_token_id_logprobs": said})
    np.testing.assert_array_equal(found, [[-1.0, np.nan], [-2.0, -3.0]])
    with pytest.raises(SamplerError, match="not"):
        prompt.targets_of(targets[:1], {"prompt_token_id_logprobs": said})
    with pytest.raises(SamplerError, match="did not answer"):
        prompt.targets_of(targets, {"prompt_token_id_logprobs": None})


def test_an_engine_that_gives_up_is_taken_for_lost():
    with pytest.raises(LostError, match="abort"):
        reason_of("abort")


def test_tokens_without_log_probabilities_are_an_error_and_no_zeros():
    answer = recorded("sample.json")
    answer["choices"][0]["logprobs"] = None
    with pytest.raises(SamplerError, match="0 log-probabilities of 3 tokens"):
        sequences(answer, 0)


def test_a_piece_counts_on_from_its_messages_first_sequence():
    choice = recorded("sample.json")["choices"][1] | {"finish_reason": None}
    found = piece(choice, 8, 0)
    assert (found.index, found.tokens, found.stop_reason) == (9, [206, 11, 284], None)


def test_a_table_of_fewer_tokens_than_columns_has_empty_cells():
    found = table([None, [(3, -1.0)]], 2)
    assert found.tokens.tolist() == [[0, 0], [3, 0]]
    assert found.logprobs.tolist() == [[NOTHING, NOTHING], [-1.0, NOTHING]]


def test_what_an_engine_said_is_found_however_it_is_wrapped():
    said = [said_in(json.dumps(body)) for _, body in recorded("errors.json")]
    assert said[1] == "The model `nope` does not exist. Valid aliases: base."
    assert said[3] == "Unauthorized"
    assert said_in("plain") == "plain"
