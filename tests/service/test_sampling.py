"""Sampling through the service with a real engine: Tinker's client and OpenAI's, unmodified."""

import warnings

import numpy as np
import openai
import pytest
import tinker
from tinker import types

from tests.fixtures.small_model import make_small_model
from tests.service.server import NAME, Server

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings("ignore::FutureWarning")]

IDS = list(range(5, 26))
DATUM = types.Datum(
    model_input=types.ModelInput.from_ints(IDS[:-1]),
    loss_fn_inputs={"target_tokens": types.TensorData(data=IDS[1:], dtype="int64", shape=[20])},
)
CLOSE = 1e-4
"""Of log-probabilities in float32, by two programs; 2e-6 is usual."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = make_small_model(tmp_path_factory.mktemp("model"))
    server = Server(model, tmp_path_factory.mktemp("service"))
    server.start()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def training(server):
    warnings.simplefilter("ignore")
    service = tinker.ServiceClient(base_url=server.url, api_key=server.key)
    training = service.create_lora_training_client(base_model=NAME, rank=4, seed=1).result()
    training.forward_backward([DATUM], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return training


def trained_logprobs(training) -> list[float]:
    result = training.forward([DATUM], "cross_entropy").result()
    return list(result.loss_fn_outputs[0]["logprobs"].data)


def test_what_is_sampled_from_is_what_was_trained(training):
    sampler = training.save_weights_and_get_sampling_client()
    before = trained_logprobs(training)
    found = sampler.compute_logprobs(types.ModelInput.from_ints(IDS)).result()
    np.testing.assert_allclose(found[1:], before, atol=CLOSE)
    training.forward_backward([DATUM], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    again = sampler.compute_logprobs(types.ModelInput.from_ints(IDS)).result()
    assert again[1:] == found[1:]  # a snapshot stays as it was
    newer = training.save_weights_and_get_sampling_client()
    found = newer.compute_logprobs(types.ModelInput.from_ints(IDS)).result()
    np.testing.assert_allclose(found[1:], trained_logprobs(training), atol=CLOSE)


def test_samples_are_reproducible_and_carry_the_trainers_log_probabilities(training):
    sampler = training.save_weights_and_get_sampling_client()
    prompt = types.ModelInput.from_ints(IDS[:5])
    params = types.SamplingParams(max_tokens=6, seed=3, temperature=1.0, stop=[])
    first = sampler.sample(prompt, 3, params).result().sequences
    second = sampler.sample(prompt, 3, params).result().sequences
    assert [each.tokens for each in first] == [each.tokens for each in second]
    assert len({tuple(each.tokens) for each in first}) == 3
    whole = [*IDS[:5], *first[0].tokens]
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(whole[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=whole[1:], dtype="int64", shape=[len(whole) - 1])
        },
    )
    scored = training.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    np.testing.assert_allclose(first[0].logprobs, list(scored.data)[4:], atol=CLOSE)


def test_openais_client_completes_from_base_saved_weights_and_the_newest(server, training):
    path = training.save_weights_for_sampler("for-openai").result().path
    training.save_weights_and_get_sampling_client()
    run = path.removeprefix("tinker://").split("/")[0]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key)
    assert NAME in [each.id for each in client.models.list()]
    texts = {
        model: client.completions.create(model=model, prompt="Who are", max_tokens=8, seed=1)
        .choices[0]
        .text
        for model in (NAME, path, f"{run}/latest")
    }
    assert texts[path] == texts[f"{run}/latest"] != texts[NAME]
    stream = client.completions.create(
        model=NAME, prompt="Who are", max_tokens=8, seed=1, stream=True
    )
    assert "".join(each.choices[0].text for each in stream if each.choices) == texts[NAME]


def test_another_projects_weights_are_not_sampled_from(server, training):
    path = training.save_weights_for_sampler("not-yours").result().path
    other = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=server.create_key("--project", "other")
    )
    with pytest.raises(openai.NotFoundError):
        other.completions.create(model=path, prompt="Who", max_tokens=2)
