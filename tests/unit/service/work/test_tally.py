"""Passes count for the step behind them, whichever result is taken in first."""

import asyncio

from megatrain.service.work.run_queue import RunQueue
from megatrain.service.work.run_state import RunState
from tests.unit.service.store import rows


def test_a_step_waits_for_its_passes_and_takes_none_of_the_next() -> None:
    async def check() -> None:
        run = RunState(rows.run("run"), RunQueue())
        run.begin_pass("one")
        run.begin_pass("two")
        first = run.begin_step()
        run.begin_pass("three")
        second = run.begin_step()
        waiting = asyncio.ensure_future(first.settled())
        run.end_pass("three", tokens=7, loss=3.0, seconds=1.0)
        await second.settled()
        run.end_pass("one", tokens=2, loss=0.5, seconds=1.0)
        await asyncio.sleep(0)
        assert not waiting.done()
        run.end_pass("two", tokens=3, loss=0.25, seconds=1.0)
        await asyncio.wait_for(waiting, 5)
        assert (first.tokens, first.loss, first.seconds) == (5, 0.75, 2.0)
        assert (second.tokens, second.loss) == (7, 3.0)
        assert run.counted == {}

    asyncio.run(check())


def test_a_pass_that_is_repeated_or_fails_holds_no_step_up() -> None:
    async def check() -> None:
        run = RunState(rows.run("run"), RunQueue())
        run.begin_pass("shared")
        tally = run.begin_step()
        run.begin_pass("shared")  # alone now, since the pass that it shared was refused
        run.end_pass("shared", tokens=2, loss=1.0, seconds=1.0)
        run.end_pass("shared")
        run.end_pass("a forward pass, which does not count")
        await asyncio.wait_for(tally.settled(), 5)
        assert (tally.tokens, run.tally.tokens) == (2, 0)

    asyncio.run(check())
