"""When a result is told: after its commit, or before where the ranks' driver has it too."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from megatrain.config.service import Limits
from megatrain.service.store.store import Change, Store
from megatrain.service.work.futures import Futures
from megatrain.service.work.ticket import Result, Ticket

RESULT = Result(b"done", "proto")


class SlowStore(Store):
    """SQLite that commits results when it is told to, and counts what it is asked."""

    def __init__(self, engine) -> None:
        super().__init__(engine)
        self.may_commit, self.reads = asyncio.Event(), 0

    async def write_surely(self, *changes: Change) -> None:
        await self.may_commit.wait()
        await super().write_surely(*changes)

    async def read(self, query):
        self.reads += 1
        return await super().read(query)


def ticket() -> Ticket:
    return Ticket("id", "forward_backward", "p", 1, "s", "train:r:1", None, b"{}", run="r", seq=1)


@pytest.fixture
def during(tmp_path):
    def run(test: Callable[[SlowStore, Futures, Ticket], Awaitable[None]]) -> None:
        async def whole() -> None:
            store = await SlowStore.open(f"sqlite:///{tmp_path / 'service.db'}")
            futures = Futures(store, Limits())
            try:
                await test(store, futures, await futures.accept(ticket()))
            finally:
                store.may_commit.set()
                await store.close()

        asyncio.run(whole())

    return run


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("is_held", [False, True])
def test_a_result_is_told_when_it_is_certain(during, is_held):
    async def test(store: SlowStore, futures: Futures, accepted: Ticket) -> None:
        ending = asyncio.ensure_future(futures.finish(accepted, RESULT, is_held=is_held))
        await settled()
        assert (await futures.wait(accepted, 0.01) == RESULT) is is_held
        assert not ending.done()  # whoever confirms it to the driver waits for the commit
        assert futures.num_open == 1
        store.may_commit.set()
        await ending
        assert await futures.wait(accepted, 0.01) == RESULT
        assert futures.num_open == 0

    during(test)


@pytest.mark.parametrize("is_held", [False, True])
def test_a_result_is_told_once_and_found_again(during, is_held):
    async def test(store: SlowStore, futures: Futures, accepted: Ticket) -> None:
        store.may_commit.set()
        await futures.finish(accepted, RESULT, is_held=is_held)
        await futures.finish(accepted, Result(b"other"), is_held=is_held)
        assert (await futures.get("p", "id")).result == RESULT
        again = Futures(store, Limits())
        assert (await again.get("p", "id")).result == RESULT
        assert (await again.known("p", "train:r:1")).id == "id"

    during(test)


def test_what_is_new_is_not_looked_for(during):
    async def test(store: SlowStore, futures: Futures, accepted: Ticket) -> None:
        before = store.reads
        assert await futures.known("p", "train:r:2", is_new=True) is None
        assert await futures.known("p", "train:r:1", is_new=True) is accepted
        assert store.reads == before
        assert await futures.known("p", "train:r:2") is None
        assert store.reads == before + 1

    during(test)


def test_what_is_kept_is_counted_and_forgotten(during):
    async def test(store: SlowStore, futures: Futures, accepted: Ticket) -> None:
        store.may_commit.set()
        await futures.finish(accepted, RESULT)
        assert futures.kept_bytes > len(RESULT.data)
        futures.forget_before(accepted.timing.ended + 1)
        assert futures.kept_bytes == 0

    during(test)


def test_polls_are_short_once_the_process_ends(during):
    async def test(store: SlowStore, futures: Futures, accepted: Ticket) -> None:
        waiting = asyncio.ensure_future(futures.wait(accepted, 60))
        await settled()
        futures.wake()
        assert await asyncio.wait_for(waiting, 5) is None
        assert await asyncio.wait_for(futures.wait(accepted, 60), 5) is None
        store.may_commit.set()
        later = asyncio.ensure_future(futures.wait(accepted, 60))
        await futures.finish(accepted, RESULT)
        assert await later == RESULT

    during(test)
