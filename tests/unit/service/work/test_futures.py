"""When a result is told: after its commit, or before where the ranks' driver has it too."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from megatrain.config.service import Limits
from megatrain.service.auth.meter import Charge
from megatrain.service.store.store import Change, Store
from megatrain.service.work.futures import Futures
from megatrain.service.work.ledger import Ledger
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


def ticket(seq: int = 1) -> Ticket:
    name = "id" if seq == 1 else f"id{seq}"
    idem = f"train:r:{seq}"
    return Ticket(name, "forward_backward", "p", 1, "s", idem, None, b"{}", run="r", seq=seq)


@pytest.fixture
def during(tmp_path):
    def run(test: Callable[[SlowStore, Futures, Ticket], Awaitable[None]]) -> None:
        async def whole() -> None:
            store = await SlowStore.open(f"sqlite:///{tmp_path / 'service.db'}")
            futures = Futures(store, Limits(), Ledger(AUTH))
            try:
                await test(store, futures, await futures.accept(ticket()))
            finally:
                store.may_commit.set()
                await store.close()

        asyncio.run(whole())

    return run


class Auth:
    """Hears what was used, as the authenticator does."""

    def __init__(self) -> None:
        self.settled: list[tuple[Charge, int]] = []
        self.used: list[dict[str, int]] = []

    def settle(self, charge: Charge, used: int) -> None:
        self.settled.append((charge, used))

    def use(self, project: str, session: str, base_model: str, tokens: dict[str, int]) -> None:
        assert (project, session) == ("p", "s")
        self.used.append(tokens)


AUTH = Auth()


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
        again = Futures(store, Limits(), Ledger(AUTH))
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


def test_requests_that_end_together_are_committed_together(during, caplog):
    async def test(store: SlowStore, futures: Futures, accepted: Ticket) -> None:
        tickets = [accepted, *[await futures.accept(ticket(seq)) for seq in range(2, 40)]]
        tickets[5].tokens = 1 << 80  # the database refuses it
        commits = store._number
        store.may_commit.set()
        await futures.finish_all(tickets, RESULT)
        assert store._number - commits <= 2
        assert [each.finished.is_set() for each in tickets] == [n != 5 for n in range(39)]
        assert "left without its result" in caplog.text

    during(test)


def test_a_result_that_cannot_be_kept_makes_room_for_an_error(during):
    def refused(connection) -> None:
        raise ValueError("no such column")

    async def test(store: SlowStore, futures: Futures, accepted: Ticket) -> None:
        store.may_commit.set()
        with pytest.raises(ValueError, match="no such column"):
            await futures.finish(accepted, RESULT, refused)
        assert not accepted.finished.is_set()
        error = Result.of_error(ValueError("inside"))
        await futures.finish(accepted, error)
        assert await futures.wait(accepted, 1.0) == error

    during(test)


@pytest.mark.parametrize("failed", [False, True])
def test_what_was_counted_and_not_used_is_given_back(during, failed):
    async def test(store: SlowStore, futures: Futures, accepted: Ticket) -> None:
        AUTH.__init__()
        accepted.charge = charge = Charge(("2026-01-01", "p", 1), 50)
        accepted.tokens = 20
        store.may_commit.set()
        await futures.finish(accepted, Result(b"", failed=failed))
        await futures.finish(accepted, RESULT)
        assert AUTH.settled == [(charge, 0 if failed else 20)]
        assert AUTH.used == ([] if failed else [{"training": 20}])

    during(test)
