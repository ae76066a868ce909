"""All requests that this process knows: accepted once, finished once, asked for many times."""

import asyncio
import collections
import contextlib
import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatrain.config.service import Limits
from megatrain.errors import MegatrainError, NotFoundError
from megatrain.service.auth.meter import charge_of
from megatrain.service.observe.note import about
from megatrain.service.observe.series import RequestSeries
from megatrain.service.store import requests
from megatrain.service.store.records import Request
from megatrain.service.store.store import Change, Store
from megatrain.service.work.ledger import Ledger
from megatrain.service.work.ticket import REFUSED, Result, ResultKind, Ticket, busy

logger = logging.getLogger(__name__)

TICKET_BYTES = 4096
"""What a request takes in memory beside its result: its texts, times and events."""
ENDING_POLL_S = 1.0
"""While this process ends, a poll is held no longer; its client asks again at once."""
KEPT_BYTES = 256 << 20
"""Results that are kept in memory after they were committed; older ones are read again."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampling request that is done."""

    request_id: str
    failed: bool
    size: int
    """Bytes of its result."""
    ended: float
    """By time.monotonic."""

    def said(self) -> dict[str, Any]:
        """Return it as clients read it."""
        if self.failed:
            return {"state": "failed", "request_id": self.request_id}
        said = {"state": "finished", "request_id": self.request_id}
        return said | {"response_payload_uncompressed_size": self.size}


@dataclass(slots=True)
class Completions:
    """The finished requests of a sampling session, in the order of their ends."""

    entries: collections.deque[Completion] = field(default_factory=collections.deque)
    forgotten: int = 0
    """How many came before the entries."""

    def since(self, cursor: int) -> tuple[list[Completion], int]:
        """Return what came after a cursor, and the next one; all that is known after a cursor of
        an earlier process."""
        end = self.forgotten + len(self.entries)
        skipped = 0 if cursor > end else max(0, cursor - self.forgotten)
        return list(itertools.islice(self.entries, skipped, None)), end

    def forget_before(self, when: float) -> None:
        """Forget what ended before, by time.monotonic."""
        while self.entries and self.entries[0].ended < when:
            self.entries.popleft()
            self.forgotten += 1


class Futures:
    """Tickets by id, and by what makes a request the same when it comes again."""

    def __init__(self, store: Store, limits: Limits, ledger: Ledger) -> None:
        self._store, self._limits, self._ledger = store, limits, ledger
        self._open: dict[str, Ticket] = {}
        self._by_idem: dict[str, Ticket] = {}
        self._kept: collections.OrderedDict[str, Ticket] = collections.OrderedDict()
        self._kept_bytes = 0
        self._counts: collections.Counter[str] = collections.Counter()
        self._ends = asyncio.Event()
        self._anything = asyncio.Event()
        """Set, and made anew, when anything is finished."""
        self._of_sampler: dict[str, Completions] = {}
        self.series = RequestSeries()

    @property
    def num_open(self) -> int:
        """Requests without a result."""
        return len(self._open)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the results that are kept in memory."""
        return self._kept_bytes

    def open(self) -> Iterable[Ticket]:
        """Return what waits or runs."""
        return list(self._open.values())

    async def known(self, project: str, idem: str, *, is_new: bool = False) -> Ticket | None:
        """Return the ticket of a request that came before, once it is committed.

        With `is_new` the caller knows that it is not in the database.
        """
        ticket = self._by_idem.get(idem)
        if ticket is None:
            if is_new:
                return None
            record = await self._store.read(requests.by_idem(project, idem))
            return None if record is None else ticket_of(record)
        if ticket.project != project:
            return None
        await ticket.committed.wait()
        if ticket.refused is not None:
            raise ticket.refused
        return ticket

    def check_room(self, project: str) -> None:
        """Raise BusyError while too much waits."""
        if self._counts[project] >= self._limits.max_queued:
            raise busy("this project", self._limits.max_queued)
        if len(self._open) >= self._limits.max_queued_total:
            raise busy("all projects", self._limits.max_queued_total, 2.0)

    async def accept(self, ticket: Ticket, *changes: Change) -> Ticket:
        """Commit a request and return its ticket, or that of the same request that came before.

        `changes` are committed with it.  It is not in the database: `known` has just said so.

        Raises BusyError while too much waits; what the store raises if it cannot be committed.
        """
        if (racing := self._by_idem.get(ticket.idem)) is not None:  # while the store was asked
            return await self._settled(racing)
        self.check_room(ticket.project)
        self._add(ticket)
        # What is committed stays known, also if the client has hung up meanwhile.
        return await asyncio.shield(self._commit(ticket, changes))

    async def _commit(self, ticket: Ticket, changes: Sequence[Change]) -> Ticket:
        try:
            await self._store.write(requests.add(record_of(ticket)), *changes)
        except BaseException as error:
            ticket.refused = error if isinstance(error, MegatrainError) else None
            self._drop(ticket)
            if ticket.refused is None:
                ticket.refused = NotFoundError("the request could not be kept; send it again")
            raise
        finally:
            ticket.timing.committed = time.monotonic()
            ticket.committed.set()
        return ticket

    async def _settled(self, ticket: Ticket) -> Ticket:
        await ticket.committed.wait()
        if ticket.refused is not None:
            raise ticket.refused
        return ticket

    def take_up(self, record: Request, content: object) -> Ticket:
        """Return the ticket of a request that an earlier process accepted and did not finish."""
        ticket = ticket_of(record)
        ticket.content = content
        if not record.payload.startswith(REFUSED):
            ticket.charge = charge_of(record.created, record.project, record.key_id, record.tokens)
        self._add(ticket)
        return ticket

    def _add(self, ticket: Ticket) -> None:
        self._open[ticket.id] = ticket
        self._by_idem[ticket.idem] = ticket
        self._counts[ticket.project] += 1

    def _drop(self, ticket: Ticket) -> None:
        if self._open.pop(ticket.id, None) is not None:
            self._counts[ticket.project] -= 1
        if self._by_idem.get(ticket.idem) is ticket:
            del self._by_idem[ticket.idem]

    async def finish(
        self, ticket: Ticket, result: Result, *changes: Change, is_held: bool = False
    ) -> None:
        """Commit a result and give it to who waits; the first result counts.

        `changes` are committed with it.  With `is_held` the result is given before that: it is
        certain already, since the ranks' driver gives it again until it is confirmed.

        Raises what the database says of the changes; the request has no result then.
        """
        if ticket.id not in self._open or ticket.result is not None:
            return
        ticket.result = result
        state = "failed" if result.failed else "done"
        if ticket.cancelled:
            state = "cancelled"
        # A task that is cancelled meanwhile does not leave a ticket without an end.
        await asyncio.shield(self._end(ticket, result, state, changes, is_held))

    async def finish_all(self, tickets: Iterable[Ticket], result: Result) -> None:
        """Give requests one result, committed together; one that fails keeps none from theirs."""
        ends = (self.finish(ticket, result) for ticket in tickets)
        for error in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(error, Exception):
                logger.error("a request was left without its result", exc_info=error)

    async def _end(
        self,
        ticket: Ticket,
        result: Result,
        state: str,
        changes: Sequence[Change],
        is_held: bool,
    ) -> None:
        if is_held:
            self._tell(ticket, result, state)
        ended = requests.finish(
            ticket.id, state, result.data, result.kind, time.time(), ticket.tokens
        )
        try:
            await self._store.write_surely(ended, *changes)
        except Exception:
            if not is_held:
                ticket.result = None  # it may get another, an error for one
            raise
        self._drop(ticket)
        self._ledger.settle(ticket, failed=result.failed)
        ticket.content, ticket.payload = None, b""
        if not is_held:
            self._tell(ticket, result, state)
        self._keep(ticket)

    def _tell(self, ticket: Ticket, result: Result, state: str) -> None:
        """Give a result to who waits."""
        ticket.timing.ended = time.monotonic()
        self._count(ticket, state)
        if ticket.sampler is not None:
            done = Completion(ticket.id, result.failed, len(result.data), ticket.timing.ended)
            self._of_sampler.setdefault(ticket.sampler, Completions()).entries.append(done)
        ticket.finished.set()
        self._anything.set()
        self._anything = asyncio.Event()

    def _count(self, ticket: Ticket, state: str) -> None:
        note = ticket.note
        self.series.ended(ticket.kind, state, ticket.timing)
        if note is not None and note.spans is not None:
            note.spans.request(ticket, note.context, failed=state != "done")
        ticket.note = None  # it holds what the HTTP request was about, and that is over

    def _keep(self, ticket: Ticket) -> None:
        self._kept[ticket.id] = ticket
        self._kept_bytes += size_of(ticket)
        while self._kept_bytes > KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= size_of(oldest)

    async def get(self, project: str, request_id: str) -> Ticket:
        """Return a request of a project.  Raises NotFoundError."""
        ticket = self._open.get(request_id) or self._kept.get(request_id)
        if ticket is None:
            record = await self._store.read(requests.get(project, request_id))
            if record is None:
                raise NotFoundError(f"there is no request {request_id!r}, or it is forgotten")
            ticket = ticket_of(record)
        if ticket.project != project:
            raise NotFoundError(f"there is no request {request_id!r}, or it is forgotten")
        about(project=ticket.project, run=ticket.run)
        return ticket

    async def wait(self, ticket: Ticket, timeout_s: float) -> Result | None:
        """Return a request's result; None if there is none in time."""
        if self._ends.is_set():  # results still come, and those that wait come back at once
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ticket.finished.wait(), min(timeout_s, ENDING_POLL_S))
        elif not ticket.finished.is_set():
            waits = [asyncio.ensure_future(e.wait()) for e in (ticket.finished, self._ends)]
            try:
                await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in waits:
                    each.cancel()
        return ticket.result if ticket.finished.is_set() else None

    def wake(self) -> None:
        """Let nobody wait for long any more: this process ends."""
        self._ends.set()

    def forget_before(self, when: float) -> None:
        """Forget results that were finished before, by time.monotonic."""
        for finished in self._of_sampler.values():
            finished.forget_before(when)
        while self._kept:
            oldest = next(iter(self._kept.values()))
            if oldest.timing.ended >= when:
                return
            del self._kept[oldest.id]
            self._kept_bytes -= size_of(oldest)

    async def anything(self, timeout_s: float) -> None:
        """Wait until any request is finished, or for so long."""
        with contextlib.suppress(TimeoutError):
            ending = min(timeout_s, ENDING_POLL_S)
            async with asyncio.timeout(ending if self._ends.is_set() else timeout_s):
                await self._anything.wait()

    def completions(self, sampler: str, cursor: int) -> tuple[list[Completion], int]:
        """Return the requests of a sampling session that ended after a cursor, and the next one."""
        return self._of_sampler.get(sampler, Completions()).since(cursor)

    def forget_sampler(self, sampler: str) -> None:
        """Forget what a sampling session that is over has finished."""
        self._of_sampler.pop(sampler, None)


def size_of(ticket: Ticket) -> int:
    """Return the bytes that a ticket with a result takes."""
    return TICKET_BYTES + (0 if ticket.result is None else len(ticket.result.data))


def record_of(ticket: Ticket) -> Request:
    """Return a request as the database keeps it."""
    return Request(
        id=ticket.id,
        project=ticket.project,
        key_id=ticket.key_id,
        session=ticket.session,
        run=ticket.run,
        sampler=ticket.sampler,
        kind=ticket.kind,
        seq=ticket.seq,
        idem=ticket.idem,
        payload=ticket.payload,
        created=ticket.created,
        tokens=ticket.tokens,
    )


def ticket_of(record: Request) -> Ticket:
    """Return the ticket of a request that the database has kept."""
    ticket = Ticket(
        id=record.id,
        kind=record.kind,
        project=record.project,
        key_id=record.key_id,
        session=record.session,
        idem=record.idem,
        content=None,
        payload=record.payload,
        run=record.run,
        sampler=record.sampler,
        seq=record.seq,
        tokens=record.tokens,
        created=record.created,
    )
    ticket.committed.set()
    if record.state != "queued":
        kind: ResultKind = "proto" if record.result_type == "proto" else "json"
        ticket.result = Result(record.result or b"", kind, failed=record.state != "done")
        ticket.finished.set()
    return ticket
