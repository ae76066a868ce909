"""Keeps an engine up: starts it, notices that it is gone, starts it again with growing pauses."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from megatrain.errors import SamplerError

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LAST_PAUSE_S = 30.0
"""Seconds between two attempts; doubled each time."""
HEALTHY_S = 60.0
"""An engine that ran so long starts again with the first pause."""


class Keeper:
    """Watches one engine."""

    def __init__(
        self,
        name: str,
        launch: Callable[[], Awaitable[None]],
        lost: Callable[[], Awaitable[str]],
        *,
        wait_s: float,
    ) -> None:
        """`launch` starts the engine until it answers, or raises; `lost` returns, with the reason,
        when it is gone; a caller waits at most `wait_s` for one that starts again."""
        self._name, self._launch, self._lost, self._wait_s = name, launch, lost, wait_s
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.restarts = 0
        self.error = "it is not started"

    @property
    def is_ready(self) -> bool:
        """Whether the engine answers."""
        return self._ready.is_set()

    async def start(self) -> None:
        """Start the engine and the watch.  Raises SamplerError."""
        if self._task is None:
            await self._launch()
            self._set_ready()
            self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """End the watch; idempotent."""
        self._ready.clear()
        self.error = "it is closed"
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def until_ready(self) -> None:
        """Wait for an engine that starts again.  Raises SamplerError after `wait_s`."""
        if self.is_ready:
            return
        if self._task is None:
            raise SamplerError(f"the sampler {self._name} does not answer: {self.error}")
        try:
            await asyncio.wait_for(self._ready.wait(), self._wait_s)
        except TimeoutError:
            raise SamplerError(
                f"the sampler {self._name} does not answer: {self.error}",
                hint="look at its log; it is started again by itself",
            ) from None

    def note_lost(self, reason: str) -> None:
        """Let callers wait from now on; the watch sees to the rest."""
        self._ready.clear()
        self.error = reason

    def _set_ready(self) -> None:
        self.error = ""
        self._ready.set()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE_S
        while True:
            since = loop.time()
            self.error = await self._lost()
            self._ready.clear()
            logger.warning("the sampler %s is gone: %s", self._name, self.error)
            if loop.time() - since > HEALTHY_S:
                pause = FIRST_PAUSE_S
            pause = await self._again(pause)

    async def _again(self, pause: float) -> float:
        """Start the engine again, however often it takes; return the next pause."""
        while True:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)
            self.restarts += 1
            try:
                await self._launch()
            except (SamplerError, OSError) as error:
                self.error = str(error)
                logger.warning("the sampler %s did not start again: %s", self._name, error)
            else:
                self._set_ready()
                logger.warning("the sampler %s runs again", self._name)
                return pause
