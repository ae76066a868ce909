"""Adapters that a sampler holds: each version under a name and in a folder of its own.

A version goes when it is retired and the last request that uses it is done; its folder goes after
the sampler has let go of it.
"""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from megatrain.errors import MegatrainError, SamplerError
from megatrain.sampler.types import Sampler

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Version:
    """One state of one adapter, as the sampler knows it."""

    name: str
    """The sampler's name for it; never used twice."""
    source: str
    """The run or checkpoint that it is of."""
    step: int
    """Optimizer steps of the run when it was taken."""
    directory: Path
    is_owned: bool
    """Whether the folder is deleted with it."""
    users: int = 0
    """Requests that use it, and sessions that may."""
    retired: bool = False
    drained: asyncio.Event = field(default_factory=asyncio.Event)


class Versions:
    """The versions that one sampler holds."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._known: dict[str, Version] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def list(self) -> list[Version]:
        """Return all versions that the sampler may be asked for."""
        return list(self._known.values())

    def get(self, name: str) -> Version | None:
        """Return a version by its name."""
        return self._known.get(name)

    async def load(self, version: Version) -> None:
        """Let the sampler load a version.  Raises SamplerError, ConfigError."""
        if version.name in self._known:
            raise SamplerError(f"the sampler has a version called {version.name!r} already")
        await self._sampler.load_adapter(version.name, version.directory)
        self._known[version.name] = version

    def hold(self, version: Version) -> None:
        """Keep a version from going, until `release`."""
        version.users += 1

    def release(self, version: Version) -> None:
        """Undo one `hold`."""
        version.users -= 1
        self._look(version)

    @contextlib.asynccontextmanager
    async def use(self, version: Version) -> AsyncIterator[str]:
        """Hold a version while a request uses it; gives the sampler's name."""
        self.hold(version)
        try:
            yield version.name
        finally:
            self.release(version)

    def retire(self, version: Version) -> None:
        """Let a version go as soon as nobody uses it."""
        version.retired = True
        self._look(version)

    def _look(self, version: Version) -> None:
        if not version.retired or version.users > 0 or version.drained.is_set():
            return
        version.drained.set()
        self._known.pop(version.name, None)
        task = asyncio.ensure_future(self._unload(version))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unload(self, version: Version) -> None:
        try:
            await self._sampler.unload_adapter(version.name)
        except MegatrainError as error:  # a sampler that is gone holds nothing
            logger.warning("version %s could not be unloaded: %s", version.name, error.message)
        if version.is_owned:
            await asyncio.to_thread(shutil.rmtree, version.directory, ignore_errors=True)

    async def close(self) -> None:
        """Wait for what is being unloaded."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=10.0)
