"""What a run's requests do on the ranks: passes, steps, and what belongs to them.

A command that changes something carries a tag, and its result is confirmed when it is committed: so
whatever dies, it is done once, and its result comes once.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from megatrain.bus.codec import Failure
from megatrain.bus.commands import Command, ForwardBackwardMany, ForwardMany
from megatrain.bus.failures import error_of
from megatrain.errors import DataError, MegatrainError
from megatrain.service.fleet.fleet import Fleet, is_shutdown
from megatrain.service.store import runs
from megatrain.service.store.store import Change
from megatrain.service.wire.batch import from_output, to_batch
from megatrain.service.wire.passes import encode_pass_result
from megatrain.service.work.futures import Futures
from megatrain.service.work.run_state import RunState
from megatrain.service.work.scheduler import PASSES, Member
from megatrain.service.work.ticket import Result, Ticket
from megatrain.types import StepOutput

logger = logging.getLogger(__name__)

Operation = Callable[[RunState, Ticket], Awaitable[tuple[Result, Sequence[Change]]]]
"""Does a request that is no pass; returns its result and what is committed with it."""


class Training:
    """Does what the scheduler has chosen."""

    def __init__(self, fleet: Fleet, futures: Futures, operations: dict[str, Operation]) -> None:
        """`operations` by kind of request."""
        self._fleet, self._futures, self._operations = fleet, futures, operations
        self.trained_tokens = 0
        """Tokens of all passes since the start."""

    async def start(self, members: Sequence[Member]) -> None:
        """Do a pass of several runs, or one operation, and finish its requests."""
        run, ticket = members[0]
        if isinstance(ticket.content, MegatrainError):  # what was wrong when it came
            for each, refused in members:
                await self._finish(each, refused, Result.of_error(refused.content))
            return
        if ticket.kind in PASSES:
            await self._pass(members)
            return
        try:
            result, changes = await self._operations[ticket.kind](run, ticket)
        except Exception as error:  # noqa: BLE001 - every request gets a result
            await self._failed(run, ticket, error)
        else:
            await self._finish(run, ticket, result, changes)
        if ticket.tag:
            self._fleet.confirm(ticket.tag)

    async def _pass(self, members: Sequence[Member]) -> None:
        train = members[0][1].kind == "forward_backward"
        tag = members[0][1].tag or (tag_of(members) if train else "")
        for _, ticket in members:
            ticket.tag = tag
        began = time.monotonic()
        try:
            values = await self._fleet.submit(lambda: _command(members, train, tag), tag)
        except Exception as error:  # noqa: BLE001 - every request gets a result
            if len(members) == 1 or not isinstance(error, MegatrainError):
                for run, ticket in members:
                    await self._failed(run, ticket, error)
            elif not is_shutdown(self._fleet, error):
                await self._each_alone(members)
        else:
            seconds = time.monotonic() - began
            await asyncio.gather(*(self._passed(m, values, seconds) for m in members))
        if tag:
            self._fleet.confirm(tag)

    async def _each_alone(self, members: Sequence[Member]) -> None:
        """Repeat a pass that was refused, one run after the other: it is one's fault."""
        for run, ticket in members:
            ticket.tag = ""
            await self._pass([(run, ticket)])

    async def _passed(self, member: Member, values: dict[str, object], seconds: float) -> None:
        run, ticket = member
        output = values[run.adapter]
        if isinstance(output, Failure):
            await self._failed(run, ticket, error_of(output))
            return
        assert isinstance(output, StepOutput)
        result = from_output(ticket.content, output)
        if ticket.kind == "forward_backward":
            run.pass_tokens += ticket.tokens
            run.pass_loss += result.metrics.get("loss:sum", 0.0)
            run.pass_seconds += seconds
        self.trained_tokens += ticket.tokens
        data = await asyncio.to_thread(encode_pass_result, result)
        await self._finish(run, ticket, Result(data, "proto"))

    async def _failed(self, run: RunState, ticket: Ticket, error: BaseException) -> None:
        if is_shutdown(self._fleet, error):
            return  # it is done after the next start
        if not isinstance(error, MegatrainError):
            logger.error("%s of %s failed", ticket.kind, run.id, exc_info=error)
        elif not isinstance(error, DataError):
            logger.warning("%s of %s: %s", ticket.kind, run.id, error)
        result = Result.of_error(error)
        run.last_error = result.data.decode()
        await self._finish(run, ticket, result)

    async def _finish(
        self, run: RunState, ticket: Ticket, result: Result, changes: Sequence[Change] = ()
    ) -> None:
        progress = runs.progress(run.id, ticket.seq + 1, run.step, time.time())
        await self._futures.finish(ticket, result, progress, *changes)


def tag_of(members: Sequence[Member]) -> str:
    """Return the tag of a command: the requests that it is for."""
    return ",".join(ticket.id for _, ticket in members)


def _command(members: Sequence[Member], train: bool, tag: str) -> Command:
    batches = [to_batch(ticket.content, run.adapter) for run, ticket in members]
    if train:
        return ForwardBackwardMany(batches=batches, tag=tag)
    return ForwardMany(batches=batches)
