"""Whose passes are put together, and what is looked after while there is always something to do."""

import asyncio
from collections.abc import Callable, Sequence

from megatrain.errors import DataError
from megatrain.service.intake import new_run
from megatrain.service.work.run_queue import RunQueue
from megatrain.service.work.run_state import RunState
from megatrain.service.work.scheduler import Member, Scheduler
from megatrain.service.work.ticket import Ticket


def run(name: str, first: int = 1) -> RunState:
    record = new_run(
        name, 0, name, "base", lora={"rank": 2}, optimizer={"type": "adamw"}, user_metadata={}
    )
    return RunState(record, RunQueue(first))


def ticket(of: RunState, seq: int, content: object = "data", tag: str = "") -> Ticket:
    return Ticket(
        id=f"{of.project}-{seq}",
        kind="forward_backward",
        project=of.project,
        key_id=1,
        session=of.record.session,
        idem=f"{of.id}:{seq}",
        content=content,
        payload=b"",
        run=of.id,
        seq=seq,
        tokens=10,
        is_barrier=False,
        tag=tag,
    )


class Ranks:
    """Notes what is started, and finishes it when it is told to."""

    def __init__(self, *runs: RunState) -> None:
        self.passes: list[list[str]] = []
        self.given_up: list[str] = []
        self.go_on = asyncio.Event()
        self.again: Callable[[], None] = lambda: None
        self.scheduler = Scheduler(
            self._start, self._give_up, max_passes=8, max_pass_tokens=1000, gap_s=0.2, shares={}
        )
        self.scheduler.runs = {each.id: each for each in runs}

    async def _start(self, members: Sequence[Member]) -> None:
        self.passes.append([each.id for _, each in members])
        await self.go_on.wait()
        await asyncio.sleep(0.002)
        self.again()

    async def _give_up(self, given_up: Ticket, missing: Sequence[int]) -> None:
        self.given_up.append(given_up.id)

    async def work(self, seconds: float) -> None:
        task = asyncio.ensure_future(self.scheduler.run())
        await asyncio.sleep(seconds)
        task.cancel()


def test_what_is_refused_is_told_alone_and_the_others_share_a_pass() -> None:
    async def check() -> None:
        ann, bob, cyd = run("ann"), run("bob"), run("cyd")
        for order in ((ann, bob, cyd), (bob, ann, cyd), (ann, cyd, bob)):
            ranks = Ranks(ann, bob, cyd)
            seq = ann.queue.next_seq
            for each in order:
                content = DataError("not finite") if each is bob else "data"
                ranks.scheduler.put(each, ticket(each, seq, content))
            ranks.go_on.set()
            await ranks.work(0.1)
            assert [f"bob-{seq}"] in ranks.passes
            assert sorted(map(len, ranks.passes)) == [1, 2]

    asyncio.run(check())


def test_a_run_of_a_pass_that_was_shared_waits_for_its_end_after_a_new_start_too() -> None:
    async def check() -> None:
        ann = run("ann")
        ranks = Ranks(ann)
        ranks.scheduler.put(ann, ticket(ann, 1, tag="ann-1,bob-1"))
        ranks.scheduler.put(ann, ticket(ann, 2))
        await ranks.work(0.1)
        assert ranks.passes == [["ann-1"]]
        ranks.go_on.set()
        await ranks.work(0.1)
        assert ranks.passes == [["ann-1"], ["ann-2"]]

    asyncio.run(check())


def test_gaps_are_given_up_also_while_others_always_have_work() -> None:
    async def check() -> None:
        ann, bob = run("ann"), run("bob")
        ranks = Ranks(ann, bob)
        ranks.scheduler.put(ann, ticket(ann, 3))
        ranks.scheduler.put(bob, ticket(bob, 1))

        def again() -> None:
            ranks.scheduler.put(bob, ticket(bob, bob.queue.next_seq))

        ranks.again = again
        ranks.go_on.set()
        await ranks.work(1.0)
        assert ranks.given_up == ["ann-3"]
        assert len(ranks.passes) > 20

    asyncio.run(check())
