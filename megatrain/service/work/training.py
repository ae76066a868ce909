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
from megatrain.errors import DataError, MegatrainError, StateError
from megatrain.service.fleet.fleet import Fleet, is_shutdown
from megatrain.service.observe.bus_watch import charged_to
from megatrain.service.observe.note import about, serving
from megatrain.service.observe.series import PassSeries
from megatrain.service.observe.timing import Spent
from megatrain.service.store import runs
from megatrain.service.store.store import Change
from megatrain.service.wire.batch import from_output, to_batch
from megatrain.service.wire.passes import encode_pass_result
from megatrain.service.wire.types import PassRequest
from megatrain.service.work.futures import Futures
from megatrain.service.work.run_state import RunState
from megatrain.service.work.scheduler import PASSES, Member, is_shared, tag_of
from megatrain.service.work.ticket import Result, Ticket
from megatrain.types import StepOutput

logger = logging.getLogger(__name__)

MANY_TOKENS = 1 << 15
"""Results from here on are encoded in a thread: they take more than a millisecond."""

Batch = tuple[str, PassRequest]
"""Of one adapter.  It is held here while a pass runs: a ticket that has a result lets it go."""
Operation = Callable[[RunState, Ticket], Awaitable[tuple[Result, Sequence[Change]]]]
"""Does a request that is no pass; returns its result and what is committed with it."""


class Training:
    """Does what the scheduler has chosen."""

    def __init__(self, fleet: Fleet, futures: Futures, operations: dict[str, Operation]) -> None:
        """`operations` by kind of request."""
        self._fleet, self._futures, self._operations = fleet, futures, operations
        self.trained_tokens = 0
        """Tokens of all passes since the start."""
        self.series = PassSeries(fleet.name)

    async def start(self, members: Sequence[Member]) -> None:
        """Do a pass of several runs, or one operation, and finish its requests."""
        # A session that ended has given its requests their results, and content they have no more.
        left = [(run, ticket) for run, ticket in members if ticket.result is None]
        if not left:
            self._fleet.confirm(members[0][1].tag)
            return
        try:
            await self._start(left)
        except Exception as error:  # noqa: BLE001 - every request gets a result, or has it
            for run, ticket in members:
                try:
                    await self._failed(run, ticket, error)
                except Exception:
                    logger.exception("%s of %s is left without a result", ticket.kind, run.id)

    async def _start(self, members: Sequence[Member]) -> None:
        run, ticket = members[0]
        if ticket.is_refused:
            await self._refuse(run, ticket, Result.of_error(ticket.content))
            return
        if not (run.record.is_lora or is_first(ticket) or self._fleet.whole.owner == run.id):
            await self._failed(run, ticket, StateError(f"{run.id} does not have the model"))
            return
        if ticket.kind in PASSES:
            try:
                await self._pass(members)
            finally:
                for each, its in members:  # whatever became of it, no step waits for it
                    each.end_pass(its.id)
            return
        try:
            with charged_to(ticket.timing.spent):
                result, changes = await self._operations[ticket.kind](run, ticket)
        except Exception as error:  # noqa: BLE001 - every request gets a result
            await self._failed(run, ticket, error)
        else:
            ticket.timing.replied = time.monotonic()
            if ticket.kind == "optim_step":
                self.series.stepped()
            is_held = ticket.kind == "optim_step"
            await self._finish(run, ticket, result, changes, is_held=is_held)
            if run.closed:
                await self._drain(run, f"the model {run.id} was given back")
        self._fleet.confirm(ticket.tag or ticket.id)  # the tag of its command

    async def _pass(self, members: Sequence[Member]) -> None:
        members = [(run, ticket) for run, ticket in members if ticket.result is None]
        if not members:
            return
        batches = [(run.adapter, ticket.content) for run, ticket in members]
        train = members[0][1].kind == "forward_backward"
        shared = is_shared(members)
        tag = members[0][1].tag or (tag_of(members) if train else "")
        spent = Spent()
        for run, ticket in members:
            if train:
                run.begin_pass(ticket.id)
            ticket.tag, ticket.timing.spent, ticket.timing.members = tag, spent, len(members)
        began = time.monotonic()
        try:
            with charged_to(spent):
                values = await self._fleet.submit(lambda: _command(batches, train, tag), tag)
        except Exception as error:  # noqa: BLE001 - every request gets a result
            if not shared or not isinstance(error, MegatrainError):
                for run, ticket in members:
                    await self._failed(run, ticket, error)
            elif not is_shutdown(self._fleet, error):
                await self._each_alone(members)
        else:
            seconds = time.monotonic() - began
            self._count(members, batches, seconds, spent.ranks_s)
            await asyncio.gather(
                *(
                    self._passed(member, content, values, seconds)
                    for member, (_, content) in zip(members, batches, strict=True)
                )
            )
        if tag:
            self._fleet.confirm(tag)

    def _count(
        self, members: Sequence[Member], batches: Sequence[Batch], seconds: float, ranks_s: float
    ) -> None:
        for _, ticket in members:
            ticket.timing.replied = time.monotonic()
        self.series.passed(
            members[0][1].kind,
            runs=len(members),
            data=sum(len(content.data) for _, content in batches),
            tokens=sum(ticket.tokens for _, ticket in members),
            seconds=seconds,
            ranks_s=ranks_s,
        )

    async def _each_alone(self, members: Sequence[Member]) -> None:
        """Repeat a pass that was refused, one run after the other: it is one's fault."""
        for run, ticket in members:
            ticket.tag = ""
            await self._pass([(run, ticket)])

    async def _passed(
        self, member: Member, content: PassRequest, values: dict[str, object], seconds: float
    ) -> None:
        run, ticket = member
        if ticket.result is not None:  # its session has ended
            return
        try:
            output = values[run.adapter]
            if isinstance(output, Failure):
                raise error_of(output)
            assert isinstance(output, StepOutput)
            result = from_output(content, output)
            loss = result.metrics.get("loss:sum", 0.0)
            run.end_pass(ticket.id, tokens=ticket.tokens, loss=loss, seconds=seconds)
            self.trained_tokens += ticket.tokens
            if ticket.tokens >= MANY_TOKENS:
                data = await asyncio.to_thread(encode_pass_result, result)
            else:
                data = encode_pass_result(result)
            await self._finish(run, ticket, Result(data, "proto"), is_held=bool(ticket.tag))
        except Exception as error:  # noqa: BLE001 - others of this pass have results of their own
            await self._failed(run, ticket, error)

    async def _failed(self, run: RunState, ticket: Ticket, error: BaseException) -> None:
        if is_shutdown(self._fleet, error):
            return  # it is done after the next start
        with serving(ticket.note):
            about(run=run.id)
            if not isinstance(error, MegatrainError):
                logger.error("%s of %s failed", ticket.kind, run.id, exc_info=error)
            elif not isinstance(error, DataError):
                logger.warning("%s of %s: %s", ticket.kind, run.id, error)
        run.end_pass(ticket.id)
        result = Result.of_error(error)
        run.last_error = result.data.decode()
        await self._refuse(run, ticket, result)

    async def _refuse(self, run: RunState, ticket: Ticket, result: Result) -> None:
        """Finish a request that was not done; a run that was not made takes no more of them."""
        if not is_first(ticket):
            await self._finish(run, ticket, result)
            return
        run.closed = True
        await self._finish(run, ticket, result, [runs.set_state(run.id, "failed")])
        await self._drain(run, f"the model {run.id} could not be made")

    async def _drain(self, run: RunState, why: str) -> None:
        """Finish what waits of a run that takes no more requests."""
        for waiting in run.queue.drain():
            await self._finish(run, waiting, Result.of_error(StateError(why)))

    async def _finish(
        self,
        run: RunState,
        ticket: Ticket,
        result: Result,
        changes: Sequence[Change] = (),
        *,
        is_held: bool = False,
    ) -> None:
        progress = runs.progress(run.id, ticket.seq + 1, run.step, time.time())
        await self._futures.finish(ticket, result, progress, *changes, is_held=is_held)


def is_first(ticket: Ticket) -> bool:
    """Tell whether a request is the one that makes its run."""
    return ticket.seq == 0 and ticket.kind in ("create_model", "load_weights")


def _command(batches: Sequence[Batch], train: bool, tag: str) -> Command:
    made = [to_batch(content, adapter) for adapter, content in batches]
    if train:
        return ForwardBackwardMany(batches=made, tag=tag)
    return ForwardMany(batches=made)
