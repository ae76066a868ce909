"""Processes that are killed while ten clients train, save, load and sample: all of them finish.

Where no two tenants share a pass, each adapter is bit for bit the one of a run without faults.  A
shared pass adds in another order from run to run: losses differ by 2e-7 of themselves, and AdamW
divides a gradient by its own size, however small it is.  Two runs without faults differ by up to
3.2e-6 in an adapter, whose greatest number is 0.16 and whose steps are 1e-2.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.fixtures.small_model import make_small_model
from tests.service import postgres
from tests.service.clients import STEPS, Clients, Trained
from tests.service.configured import ConfiguredServer, kill

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.timeout(900),
]

COUNT = 10
SHARED = 2e-5
"""Greatest difference in an adapter where passes are shared; one step more or less makes 1e-2."""
AWAY_S = 8.0
"""Seconds that the database is away: longer than any client waits for an answer."""


class World:
    """A service on two ranks with sampler and PostgreSQL, and what its clients get undisturbed."""

    def __init__(
        self, server: ConfiguredServer, database: postgres.Postgres, tolerance: float
    ) -> None:
        self.server, self.database, self.tolerance = server, database, tolerance
        self.expected = self.work(lambda clients: None)

    def work(self, disturb: Callable[[Clients], None]) -> dict[int, Trained]:
        clients = Clients(self.server, COUNT)
        clients.start()
        disturb(clients)
        return clients.join()


@pytest.fixture(scope="module", params=["alone", "shared"])
def world(request, tmp_path_factory) -> Iterator[World]:
    if postgres.programs() is None:
        pytest.skip("PostgreSQL is not installed")
    is_shared = request.param == "shared"
    with postgres.running() as database:
        server = ConfiguredServer(
            make_small_model(tmp_path_factory.mktemp("model")),
            tmp_path_factory.mktemp("service"),
            served={
                "ranks": 2,
                "tp": 2,
                "sampler": {"engine": "transformers"},
                "bus": {"fork_ranks": True, "recovery": {"max_restarts": 1}},
            },
            database=database.url,
            limits={} if is_shared else {"max_pass_tokens": 1},
        )
        server.start()
        yield World(server, database, SHARED if is_shared else 0.0)
        assert server.stop() == 0


def check(world: World, found: dict[int, Trained]) -> None:
    assert sorted(found) == list(range(COUNT))
    for seed, expected in world.expected.items():
        got = found[seed]
        assert got.adapter.keys() == expected.adapter.keys()
        for name, tensor in expected.adapter.items():
            np.testing.assert_allclose(
                got.adapter[name], tensor, rtol=0, atol=world.tolerance, err_msg=f"{seed}: {name}"
            )
        np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
        assert [len(each) for each in got.samples] == [len(each) for each in expected.samples]


def test_runs_without_a_fault_are_the_same(world):
    check(world, world.work(lambda clients: None))


def test_the_service_is_killed_twice(world):
    def disturb(clients: Clients) -> None:
        for steps in (COUNT, 3 * COUNT):
            clients.wait_for_steps(steps)
            world.server.kill()
            world.server.start()

    check(world, world.work(disturb))


def test_ranks_are_killed_more_often_than_their_driver_starts_them_again(world):
    def disturb(clients: Clients) -> None:
        for steps in (COUNT, 2 * COUNT, 4 * COUNT):
            clients.wait_for_steps(steps)
            kill(world.server.descendants("fork_server")[-1])

    check(world, world.work(disturb))
    assert "the driver gives up" in world.server.log


def test_the_sampler_is_killed_while_it_samples(world):
    def disturb(clients: Clients) -> None:
        for steps in (COUNT, 2 * COUNT, 4 * COUNT):
            clients.wait_for_steps(min(steps, COUNT * STEPS))
            kill(world.server.descendants("megatrain.sampler.transformers_server")[-1])

    check(world, world.work(disturb))
    assert "the sampler transformers runs again" in world.server.log


def test_the_database_is_killed_and_started_again(world):
    def disturb(clients: Clients) -> None:
        clients.wait_for_steps(COUNT)
        world.database.kill()
        time.sleep(AWAY_S)
        world.database.start()
        clients.wait_for_steps(3 * COUNT)
        world.database.kill()
        world.database.start()

    check(world, world.work(disturb))
