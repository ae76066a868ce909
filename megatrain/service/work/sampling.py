"""Sampling requests of one base model: fairly to the engine, and back as results."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace

from megatrain.errors import BusyError, MegatrainError, RankError, SamplerError, StateError
from megatrain.sampler.types import Piece, SampleRequest, SampleResult
from megatrain.service.publish.publisher import Publisher
from megatrain.service.publish.versions import Version
from megatrain.service.store.records import SamplingSession
from megatrain.service.work.fair import Fair
from megatrain.service.work.futures import Futures
from megatrain.service.work.ticket import Result, Ticket

logger = logging.getLogger(__name__)

TRIES_S = (0.2, 1.0, 3.0, 10.0, 30.0)
"""Seconds between attempts while the engine is started again."""


@dataclass(slots=True, eq=False)
class SamplerState:
    """A sampling session while this process knows it."""

    record: SamplingSession
    version: Version | None = None
    """What it is pinned to; None for the base and for what moves with a run."""
    clones: int = 0
    """Numbers that were given to clones of its client."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """Work that waits for the engine."""

    tokens: float
    """What it may cost."""
    begin: Callable[[], None]
    is_gone: Callable[[], bool]
    """Whether nobody waits for it any more."""


Encode = Callable[[SampleResult], bytes]
Choose = Callable[[SamplerState], Version | None]
Done = Callable[[SamplerState, Ticket, SampleRequest, SampleResult, Version | None], None]


class Sampling:
    """Hands sampling requests to an engine, no more at once than it can batch."""

    def __init__(
        self,
        publisher: Publisher,
        futures: Futures,
        *,
        slots: int,
        shares: Mapping[str, float],
        choose: Choose,
        encode: Encode,
        done: Done,
    ) -> None:
        """`slots`: sequences that are given to the engine at once; `choose` says which version a
        session means now; `done` hears of every result."""
        self._publisher, self._futures = publisher, futures
        self._slots, self._shares = slots, shares
        self._choose, self._encode, self._done = choose, encode, done
        self._waiting: dict[str, deque[_Turn]] = {}
        self._fair: Fair[str] = Fair()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._passing: set[asyncio.Future[None]] = set()
        """Of requests that nobody stores, and that wait or are drawn."""
        self.running = 0
        """Sequences that the engine was given."""
        self._idle = asyncio.Event()
        """Set when nothing is drawn any more."""
        self.paused = False

    @property
    def num_waiting(self) -> int:
        """Requests that were not given to the engine yet."""
        return sum(map(len, self._waiting.values()))

    def put(self, state: SamplerState, ticket: Ticket) -> None:
        """Take a committed request in."""
        begin, is_gone = lambda: self._begin(state, ticket), lambda: ticket.result is not None
        self._wait(ticket.project, _Turn(float(ticket.tokens), begin, is_gone))

    def _wait(self, project: str, turn: _Turn) -> None:
        self._waiting.setdefault(project, deque()).append(turn)
        self._wake.set()

    @contextlib.asynccontextmanager
    async def turn(self, project: str, request: SampleRequest, *, most: int) -> AsyncIterator[None]:
        """Wait until it is a project's turn to draw, for work that nobody stores.

        Raises BusyError where `most` of its requests wait already, RankError at the end.
        """
        if self.paused:
            raise RankError("the service is being ended", hint="try again")
        if sum(not each.is_gone() for each in self._waiting.get(project, ())) >= most:
            raise BusyError(
                f"{most} requests of this project wait already, which is the limit",
                hint="wait until some are done",
            )
        granted = asyncio.get_running_loop().create_future()
        self._passing.add(granted)

        def begin() -> None:
            self.running += request.num_samples
            granted.set_result(None)

        tokens = len(request.prompt) + request.num_samples * request.max_tokens
        self._wait(project, _Turn(float(tokens), begin, granted.done))
        try:
            await granted
            yield
        finally:
            self._passing.discard(granted)
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self._freed(request.num_samples)
            granted.cancel()

    async def run(self) -> None:
        """Hand out requests until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while not self.paused and self.running < self._slots and (found := self._pick()):
                found.begin()

    def _pick(self) -> _Turn | None:
        heads = {}
        for project, queue in list(self._waiting.items()):
            while queue and queue[0].is_gone():  # cancelled while it waited
                queue.popleft()
            if queue:
                heads[project] = queue[0].tokens
            else:
                del self._waiting[project]
        weights = {project: max(self._shares.get(project, 1.0), 1e-3) for project in heads}
        chosen = self._fair.choose(heads, weights)
        return None if chosen is None else self._waiting[chosen].popleft()

    def _freed(self, num_samples: int) -> None:
        self.running -= num_samples
        self._wake.set()
        if not self.running:
            self._idle.set()

    def _begin(self, state: SamplerState, ticket: Ticket) -> None:
        request: SampleRequest = ticket.content
        self.running += request.num_samples
        ticket.timing.began = time.monotonic()
        ticket.task = task = asyncio.ensure_future(self._do(state, ticket, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(self, state: SamplerState, ticket: Ticket, request: SampleRequest) -> None:
        try:
            result = await self._draw(state, ticket, request)
        except asyncio.CancelledError:
            if self.paused:  # the process ends: it is drawn after the next start
                return
            result = Result.of_error(StateError("the request was cancelled"))
        except Exception as error:
            if not isinstance(error, MegatrainError):
                logger.exception("sampling failed")
            result = Result.of_error(error)
        finally:
            self._freed(request.num_samples)
        await self._futures.finish(ticket, result)

    async def _draw(self, state: SamplerState, ticket: Ticket, request: SampleRequest) -> Result:
        for wait_s in (*TRIES_S, None):
            version = self._choose(state)
            try:
                drawn = await self.sample(version, request)
            except SamplerError:
                if wait_s is None:
                    raise
                await asyncio.sleep(wait_s)
                continue
            self._done(state, ticket, request, drawn, version)
            return Result(await asyncio.to_thread(self._encode, drawn), "proto")
        raise AssertionError("the last attempt raises")

    async def sample(self, version: Version | None, request: SampleRequest) -> SampleResult:
        """Draw from a version, or from the base."""
        async with self._used(version) as request_of:
            return await self._publisher.sampler.sample(request_of(request))

    async def stream(self, version: Version | None, request: SampleRequest) -> AsyncIterator[Piece]:
        """Draw from a version, or from the base, and tell tokens while they come."""
        async with self._used(version) as request_of:
            async for piece in self._publisher.sampler.stream(request_of(request)):
                yield piece

    @contextlib.asynccontextmanager
    async def _used(
        self, version: Version | None
    ) -> AsyncIterator[Callable[[SampleRequest], SampleRequest]]:
        if version is None:
            yield lambda request: replace(request, adapter=None)
            return
        async with self._publisher.versions.use(version) as name:
            yield lambda request: replace(request, adapter=name)

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request; what was drawn of it is lost."""
        ticket.cancelled = True
        if ticket.task is not None:
            ticket.task.cancel()
            return
        task = asyncio.ensure_future(
            self._futures.finish(ticket, Result.of_error(StateError("the request was cancelled")))
        )
        self._tasks.add(task)  # type: ignore[arg-type]
        task.add_done_callback(self._tasks.discard)  # type: ignore[arg-type]
        self._wake.set()

    async def drain(self, timeout_s: float) -> None:
        """Start nothing more; what is not drawn in time is drawn after the next start."""
        self.paused = True
        for waits in self._passing:
            if not waits.done():
                waits.set_exception(RankError("the service is being ended", hint="try again"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.running:
                    self._idle.clear()
                    await self._idle.wait()
                if self._tasks:
                    await asyncio.wait(self._tasks)
        for task in list(self._tasks):
            task.cancel()
