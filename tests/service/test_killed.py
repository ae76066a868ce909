"""A service that is killed carries on: the official client notices nothing."""

import time

import pytest
from tinker import types

from tests.service.sdk_clients import client, datum
from tests.service.server import NAME, Server

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoints):
    server = Server(checkpoints("qwen3"), tmp_path_factory.mktemp("service"), "--sampler", "none")
    server.start()
    yield server
    assert server.stop() == 0


def test_a_killed_service_carries_on_and_nothing_is_done_twice(server):
    def train(kill_after: tuple[int, ...]) -> list[tuple[float, float]]:
        training = client(server).create_lora_training_client(base_model=NAME, rank=4, seed=2)
        training, got = training.result(), []
        for step in range(8):
            passed = training.forward_backward([datum(step), datum(50 + step)], "cross_entropy")
            stepped = training.optim_step(types.AdamParams(learning_rate=1e-2))
            if step in kill_after:
                time.sleep(0.02 * step)
                server.kill()
                server.start()
            got.append((passed.result().metrics["loss:sum"], stepped.result().metrics["grad_norm"]))
        return got

    assert train(kill_after=(2, 5)) == train(kill_after=())


def test_a_killed_service_goes_on_from_a_checkpoint_that_is_deleted(server):
    service = client(server)
    training = service.create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    path = training.save_state("gone").result().path
    second = service.create_training_client_from_state_with_optimizer(path).result()
    service.create_rest_client().delete_checkpoint_from_tinker_path(path).result()
    server.kill()
    server.start()
    assert second.forward_backward([datum(1)], "cross_entropy").result().metrics["loss:sum"] > 0
