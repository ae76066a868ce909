"""What vLLM is sent for a request."""

import itertools
from typing import Any

import pytest

from megatrain.errors import DataError
from megatrain.sampler.types import SampleRequest
from megatrain.sampler.vllm.request import bodies, check, seed_of

EOS = (2, 7)


def request(**values: Any) -> SampleRequest:
    return SampleRequest(**{"prompt": (20, 21), **values})


def params(most: int = 8, **values: Any) -> list[dict[str, Any]]:
    found = bodies(request(**values), "m", eos=EOS, most=most)
    return [body["sampling_params"] for _, body in found]


def test_tokens_go_out_as_they_are():
    ((first, body),) = bodies(request(max_tokens=3), "m~1", eos=EOS, most=8)
    assert (first, body["model"], body["token_ids"]) == (0, "m~1", [20, 21])
    assert body["sampling_params"]["max_tokens"] == 3
    assert body["sampling_params"]["n"] == 1
    assert "seed" not in body["sampling_params"]


@pytest.mark.parametrize(
    ("stop", "ids", "texts"),
    [
        (None, [2, 7], None),
        ((), [], None),
        ((5, 6), [5, 6], None),
        (("a", "", "bc"), [], ["a", "bc"]),
    ],
)
def test_only_what_was_asked_for_ends_a_sequence(stop, ids, texts):
    (found,) = params(stop=stop)
    assert found["ignore_eos"] is True
    assert found["stop_token_ids"] == ids
    assert found.get("stop") == texts
    assert found["detokenize"] is (texts is not None)
    if texts:
        assert found["include_stop_str_in_output"] is True
        assert found["skip_special_tokens"] is False


def test_more_sequences_than_one_message_may_ask_for_go_in_several_with_seeds_that_go_on():
    found = params(most=8, num_samples=19, seed=3)
    assert [each["n"] for each in found] == [8, 8, 3]
    assert [each["seed"] - seed_of(3) for each in found] == [0, 8, 16]


def test_seeds_side_by_side_share_no_sequence_and_fit_into_64_bits():
    starts = sorted(seed_of(seed) for seed in [*range(-1000, 1000), 1 << 63])
    assert starts[0] >= 0
    assert starts[-1] < 1 << 62
    assert min(b - a for a, b in itertools.pairwise(starts)) > 1 << 20


def test_greedy_sequences_are_drawn_once():
    (found,) = params(num_samples=5, temperature=0.0)
    assert found["n"] == 1


def test_a_table_asks_for_one_token_more_since_vllm_may_cut_one_off():
    assert params(topk_sample_logprobs=4)[0]["logprobs"] == 5
    assert params()[0]["logprobs"] == 0


@pytest.mark.parametrize("temperature", [0.001, 2.1, -1.0])
def test_temperatures_that_vllm_would_change_are_refused(temperature):
    with pytest.raises(DataError, match=r"0 and 0\.01 to 2"):
        check(request(temperature=temperature), reads_texts=True)
    check(request(temperature=0.0), reads_texts=True)


def test_all_of_top_k_is_vllms_zero():
    assert params(top_k=-1)[0]["top_k"] == 0
    assert params(top_k=5)[0]["top_k"] == 5


def test_texts_need_a_tokenizer():
    with pytest.raises(DataError, match="need a tokenizer"):
        check(request(stop=("a",)), reads_texts=False)
    check(request(stop=(5,)), reads_texts=False)
