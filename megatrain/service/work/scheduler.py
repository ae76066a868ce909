"""READ FIRST of the service's work.  What a model's ranks do next.

put       a committed request joins its run's queue
choose    runs whose turn it is, fairly by tokens; passes of several runs are put together
start     a task per pass or operation; a run waits for its own barrier, never for others
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from megatrain.service.work.fair import Fair
from megatrain.service.work.run_state import RunState
from megatrain.service.work.ticket import Ticket

logger = logging.getLogger(__name__)

PASSES = frozenset({"forward", "forward_backward"})
OPERATION_COST = 64.0
"""What anything but a pass is charged, in tokens."""
MAX_OPERATIONS = 64
"""Operations that are on the ranks at once."""

SEPARATOR = ","
"""Between the requests in the tag of a pass that they share."""

Member = tuple[RunState, Ticket]
Start = Callable[[Sequence[Member]], Awaitable[None]]
GiveUp = Callable[[Ticket, Sequence[int]], Awaitable[None]]


class Scheduler:
    """Hands requests of all runs of one model to whatever does them."""

    def __init__(
        self,
        start: Start,
        give_up: GiveUp,
        *,
        max_passes: int,
        max_pass_tokens: int,
        gap_s: float,
        shares: Mapping[str, float],
    ) -> None:
        """`start` does a pass of several runs or one operation, `give_up` fails a request that
        waited for the numbers it is told; `shares` are projects' where they are not 1."""
        self._start, self._give_up = start, give_up
        self._max_passes, self._max_pass_tokens = max_passes, max_pass_tokens
        self._gap_s, self._shares = gap_s, shares
        self.runs: dict[str, RunState] = {}
        self._fair: Fair[str] = Fair()
        self._wake = asyncio.Event()
        self._passes = self._operations = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.paused = False

    @property
    def num_waiting(self) -> int:
        """Requests in all queues."""
        return sum(len(run.queue) for run in self.runs.values())

    @property
    def num_running(self) -> int:
        """Requests that were given to the ranks."""
        return sum(len(run.in_flight) for run in self.runs.values())

    def put(self, run: RunState, ticket: Ticket) -> bool:
        """Take a request in; return False if its number is over."""
        taken = run.queue.put(ticket.seq, ticket, time.monotonic())
        self._wake.set()
        return taken

    def wake(self) -> None:
        """Look again for work."""
        self._wake.set()

    async def run(self) -> None:
        """Hand out work until cancelled."""
        every_s = min(1.0, self._gap_s / 4)
        look_at = time.monotonic() + every_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await self._wake.wait()
            self._wake.clear()
            if time.monotonic() >= look_at:  # also where there is always something to do
                await self._look_for_gaps()
                look_at = time.monotonic() + every_s
            while not self.paused and (members := self._choose()):
                self._begin(members)

    async def drain(self, timeout_s: float) -> bool:
        """Start nothing more, and wait for what runs; return whether all of it was done."""
        self.paused = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        return not self._tasks

    async def _look_for_gaps(self) -> None:
        now = time.monotonic()
        for run in list(self.runs.values()):
            since = run.queue.gap_since
            if since is not None and now - since > self._gap_s:
                missing = run.queue.missing()
                logger.warning("run %s: requests %s never came", run.id, missing)
                for ticket in run.queue.give_up_gap(now):
                    await self._give_up(ticket, missing)

    def _heads(self) -> dict[str, Ticket]:
        """Return the requests that could start now, by run."""
        heads = {}
        for name, run in self.runs.items():
            if run.blocked or (ticket := run.queue.peek()) is None:
                continue
            is_pass = ticket.kind in PASSES
            if self._passes < self._max_passes if is_pass else self._operations < MAX_OPERATIONS:
                heads[name] = ticket
        return heads

    def _choose(self) -> list[Member]:
        """Take out what starts next: one operation, or a pass of some runs."""
        heads = self._heads()
        first = self._pick(heads)
        if first is None:
            return []
        chosen = [first]
        kind, left = first[1].kind, self._max_pass_tokens - first[1].tokens
        if first[1].tag:  # an earlier process has put this pass together
            others = [run for run in self.runs.values() if run is not first[0]]
            now = time.monotonic()
            same = [run for run in others if _tag(run) == first[1].tag]
            return [first, *((run, run.queue.pop(now)) for run in same)]
        # A run of all parameters has the ranks for itself.
        while kind in PASSES and first[0].record.is_lora and not first[1].is_refused:
            fitting = {
                name: ticket
                for name, ticket in self._heads().items()
                if ticket.kind == kind
                and not ticket.is_refused
                and not ticket.tag
                and ticket.tokens <= left
                and all(name != run.id for run, _ in chosen)
            }
            more = self._pick(fitting)
            if more is None:
                break
            chosen.append(more)
            left -= more[1].tokens
        return chosen

    def _pick(self, heads: Mapping[str, Ticket]) -> Member | None:
        costs = {
            name: float(ticket.tokens) if ticket.kind in PASSES else OPERATION_COST
            for name, ticket in heads.items()
        }
        name = self._fair.choose(costs, self._weights(heads))
        if name is None:
            return None
        run = self.runs[name]
        return run, run.queue.pop(time.monotonic())

    def _weights(self, heads: Mapping[str, Ticket]) -> dict[str, float]:
        """Return each run's share: its project's, divided among its runs that have work."""
        counts: dict[str, int] = {}
        for ticket in heads.values():
            counts[ticket.project] = counts.get(ticket.project, 0) + 1
        return {
            name: max(self._shares.get(ticket.project, 1.0), 1e-3) / counts[ticket.project]
            for name, ticket in heads.items()
        }

    def _begin(self, members: list[Member]) -> None:
        is_pass = members[0][1].kind in PASSES
        barrier = is_shared(members) or members[0][1].is_barrier
        for run, ticket in members:
            run.blocked = run.blocked or barrier
            run.in_flight.add(ticket.id)
            ticket.timing.began = time.monotonic()
        if is_pass:
            self._passes += 1
        else:
            self._operations += 1
        # An eager task submits its command before anything else is started.
        doing = self._do(members, barrier)
        task = asyncio.Task(doing, loop=asyncio.get_running_loop(), eager_start=True)
        if not task.done():
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _do(self, members: list[Member], barrier: bool) -> None:
        try:
            await self._start(members)
        except Exception:
            logger.exception("a request failed in the service itself")
        finally:
            if members[0][1].kind in PASSES:
                self._passes -= 1
            else:
                self._operations -= 1
            for run, ticket in members:
                run.in_flight.discard(ticket.id)
                if barrier:
                    run.blocked = False
            self._wake.set()


def is_shared(members: Sequence[Member]) -> bool:
    """Tell whether a pass is, or was given to the ranks as, one of several runs.

    They wait for it: should it be refused, each tries alone, in order.
    """
    return len(members) > 1 or SEPARATOR in members[0][1].tag


def tag_of(members: Sequence[Member]) -> str:
    """Return the tag of a command: the requests that it is for."""
    return SEPARATOR.join(ticket.id for _, ticket in members)


def _tag(run: RunState) -> str:
    head = run.queue.peek()
    return "" if head is None else head.tag
