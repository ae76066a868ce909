"""64 of Tinker's clients at once, each with its own adapter: no error, fair shares, bounded memory.

Two minutes with the marker slow, ten with the marker chaos.
"""

import pytest

from megatrain.cli.bench.service.crowd import Crowd, Target, run
from tests.service.server import NAME, Server

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings("ignore::FutureWarning")]

CLIENTS = 64
FAIR = 0.95
"""Jain's index; 1 where all got the same."""
ROOM = 48 << 20
"""Bytes that each process may grow by in the second half, besides results that are kept: pages
that the allocator holds after a peak, and what the database caches (at most 2 MB a connection).
A leak of a request's payload and result would be more within two minutes."""


@pytest.fixture
def server(tmp_path, checkpoints):
    model = checkpoints("qwen3", num_hidden_layers=1)  # it is the service that is to be busy
    server = Server(model, tmp_path / "service", "--sampler", "none")
    server.start()
    yield server
    assert server.stop() == 0


def check(found: Crowd) -> None:
    assert found.errors == []
    assert len(found.shares) == CLIENTS
    assert min(share.steps for share in found.shares) > 0
    assert found.jain >= FAIR
    assert found.growth("service") - found.growth("results") < ROOM
    assert found.growth("ranks") < ROOM


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_minutes_of_many_clients(server, tmp_path):
    target = Target(server.url, server.key, NAME, vocabulary=100)
    check(run(target, tmp_path, clients=CLIENTS, processes=4, seconds=120))


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_ten_minutes_of_many_clients(server, tmp_path):
    target = Target(server.url, server.key, NAME, vocabulary=100)
    check(run(target, tmp_path, clients=CLIENTS, processes=4, seconds=600))
