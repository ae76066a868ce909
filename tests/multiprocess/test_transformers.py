"""The base model in float32 against Transformers, over families."""

import pytest

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import tasks
from tests.multiprocess.data import random_batch
from tests.multiprocess.truth import all_logps, hf_model, largest_difference

pytestmark = pytest.mark.multiprocess

FAMILIES = (
    "qwen2",
    "qwen3",
    "qwen3_tied",
    "llama",
    "mistral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
)
TOLERANCE = 1e-5
"""Sums of 64 to 512 terms in another order differ by about 1e-6 in float32."""


@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(tp=2)], ids=DeviceMesh.describe)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_transformers(family, mesh, ranks, checkpoints):
    folder, batch = checkpoints(family), random_batch(6)
    expected = all_logps(hf_model(folder), batch)
    for actual in ranks.run(tasks.base_logps, mesh, folder, batch):
        assert largest_difference(actual, expected) <= TOLERANCE


def test_tp_above_the_number_of_key_value_heads_gives_the_same(ranks, checkpoints):
    folder, batch = checkpoints("qwen3"), random_batch(4)
    expected = all_logps(hf_model(folder), batch)
    actual = ranks.run(tasks.base_logps, DeviceMesh(tp=4), folder, batch)[0]
    assert largest_difference(actual, expected) <= TOLERANCE


def test_a_vocabulary_that_tp_does_not_divide_is_padded_without_a_trace(ranks, checkpoints):
    folder = checkpoints("qwen3", vocab_size=513)
    batch = [{"input_ids": [1, 512, 7, 300, 512], "labels": [1, 512, 7, 300, 512]}]
    expected = all_logps(hf_model(folder), batch)
    actual = ranks.run(tasks.base_logps, DeviceMesh(tp=4), folder, batch)[0]
    assert largest_difference(actual, expected) <= TOLERANCE


def test_a_sliding_window_of_mistral_is_the_one_of_transformers(ranks, checkpoints):
    folder, batch = checkpoints("mistral", sliding_window=8), random_batch(4)
    expected = all_logps(hf_model(folder), batch)
    for mesh in (DeviceMesh(), DeviceMesh(cp=2)):
        actual = ranks.run(tasks.base_logps, mesh, folder, batch)[0]
        assert largest_difference(actual, expected) <= TOLERANCE
