"""Runs that train every parameter, one at a time, through the service and the official client."""

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from transformers import AutoModelForCausalLM

from megatrain.tinker import create_full_training_client
from tests.service.sdk_clients import client, datum, logprobs
from tests.service.server import NAME, Server
from tests.service.truth import Truth

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CLOSE = 1e-5
"""Of log-probabilities in float32, before a step."""
DATA = [datum(1), datum(2, 20)]


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoints):
    folder = tmp_path_factory.mktemp("service")
    server = Server(checkpoints("qwen3"), folder, "--full-parameters")
    server.start()
    yield server
    assert server.stop() == 0


def steal(server: Server, key: str) -> list[str]:
    """Use a model that could not be made: another run has its parameters."""
    tried = []
    with server.http(key) as http:
        made = http.post("/create_session", json={"tags": [], "sdk_version": "0.38.0"}).json()
        run = {"session_id": made["session_id"], "model_seq_id": 0, "base_model": NAME}
        model = http.post("/create_model", json=run).json()["model_id"]
        bodies = {
            "save_weights_for_sampler": {"path": "mine"},
            "save_weights": {"path": "mine"},
            "optim_step": {"adam_params": {"learning_rate": 0.1}},
        }
        for seq, (kind, body) in enumerate(bodies.items(), 1):
            answer = http.post(f"/{kind}", json={"model_id": model, "seq_id": seq, **body})
            if answer.status_code == 200:
                said = {"request_id": answer.json()["request_id"]}
                answer = http.post("/retrieve_future", json=said)
            tried.append(answer.text)
            refusals = ("could not be made", "no model", "another run", "does not have")
            assert any(each in answer.text for each in refusals), answer.text
    return tried


def forward(training) -> np.ndarray:
    return np.concatenate(logprobs(training.forward(DATA, "cross_entropy").result()))


def give_back(server: Server, training) -> None:
    """Unload a model, as clients of the API without the SDK do."""
    with server.http() as http:
        accepted = http.post("/unload_model", json={"model_id": training.model_id}).json()
        said = http.post("/retrieve_future", json={"request_id": accepted["request_id"]})
    assert said.json()["type"] == "unload_model", said.text


def test_a_step_of_all_parameters_is_transformers(server, checkpoints):
    service = client(server)
    training = create_full_training_client(service, NAME)
    assert training.get_info().is_lora is False
    before = training.forward_backward(DATA, "cross_entropy").result()
    stepped = training.optim_step(types.AdamParams(learning_rate=1e-4)).result()
    after = forward(training)
    expected = Truth(checkpoints("qwen3")).step(None, DATA, lr=1e-4, clip=0.0)
    np.testing.assert_allclose(np.concatenate(logprobs(before)), expected.before, atol=CLOSE)
    assert stepped.metrics["grad_norm"] == pytest.approx(expected.norm, rel=1e-4)
    # Adam divides gradients by themselves, so those near zero differ by up to two learning rates.
    np.testing.assert_allclose(after, expected.after, atol=1e-3)
    assert abs(after - expected.before).max() > 0.05

    path = training.save_state("saved").result().path
    weights = training.save_weights_for_sampler("weights").result().path
    folder = server.folder / "data" / "files" / weights.removeprefix("tinker://").replace(":", "_")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = [*DATA[0].model_input.to_ints()]
    scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    own = scores.gather(
        -1, torch.tensor(list(DATA[0].loss_fn_inputs["target_tokens"].data))[:, None]
    )
    np.testing.assert_allclose(own[:, 0].detach().numpy(), after[: len(ids)], atol=CLOSE)

    with pytest.raises(tinker.RequestFailedError, match="another run"):
        create_full_training_client(service, NAME)
    thief = steal(server, server.create_key("--project", "thief"))
    assert thief, "nothing was tried"
    np.testing.assert_array_equal(forward(training), after)
    with pytest.raises(tinker.RequestFailedError, match="without a lora_config"):
        service.create_lora_training_client(base_model=NAME, rank=4).result()
    with pytest.raises(tinker.APIError, match="not for sampling"):
        service.create_sampling_client(base_model=NAME).compute_logprobs(
            DATA[0].model_input
        ).result()

    server.kill()
    server.start()
    np.testing.assert_array_equal(forward(training), after)

    give_back(server, training)
    fresh = create_full_training_client(service, NAME)
    np.testing.assert_allclose(forward(fresh), expected.before, atol=CLOSE)
    fresh.load_state(path).result()
    np.testing.assert_array_equal(forward(fresh), after)
