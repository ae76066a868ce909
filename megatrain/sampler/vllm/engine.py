"""One vLLM server: started and ended by us, or found at an address; and whether it is alive."""

import asyncio
import contextlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Protocol

from megatrain.config.service import SamplerConfig
from megatrain.errors import SamplerError
from megatrain.sampler.process import ChildProcess
from megatrain.sampler.vllm.client import Client
from megatrain.sampler.vllm.command import BASE, command, variables
from megatrain.sampler.vllm.environment import Environment

START_S = 1800.0
"""Seconds that an engine gets to load: large models are compiled, too."""
REACH_S = 60.0
"""Seconds in which a server that somebody else started must answer."""
LOOK_EVERY_S = 5.0
MAX_SILENT = 3
"""An engine that did not say so often in a row that it is alive is taken for lost."""


class Engine(Protocol):
    """A server while it is up."""

    client: Client
    base: str
    """Its name of the base."""

    async def launch(self) -> None:
        """Bring it up until it answers.  Raises SamplerError, ConfigError."""

    async def lost(self) -> str:
        """Wait until it is gone; return why."""

    def suspect(self) -> None:
        """Let `lost` look at once."""

    async def end(self) -> None:
        """Let go of it; idempotent."""

    @property
    def pid(self) -> int | None:
        """Of the process that watches over it, if it is ours."""


class _Watched:
    """What both kinds have in common: looking whether the server is alive."""

    client: Client

    def __init__(self) -> None:
        self._suspected = asyncio.Event()

    def suspect(self) -> None:
        """Let `lost` look at once."""
        self._suspected.set()

    async def _silent(self) -> str:
        """Return, with the reason, once the server does not answer any more."""
        missed = 0
        while missed < MAX_SILENT:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._suspected.wait(), LOOK_EVERY_S)
            quick = self._suspected.is_set()
            self._suspected.clear()
            if await self.client.is_healthy():
                missed = 0
            else:
                missed += MAX_SILENT if quick else 1
        return "it does not answer"

    async def _until_healthy(self, limit_s: float) -> None:
        loop = asyncio.get_running_loop()
        limit = loop.time() + limit_s
        while not await self.client.is_healthy():
            if loop.time() > limit:
                raise SamplerError(f"vLLM did not answer within {limit_s:g} s")
            await asyncio.sleep(0.1)


class OwnEngine(_Watched):
    """A server in a process of ours, at a socket in a folder that only we can enter."""

    base = BASE

    def __init__(
        self, config: SamplerConfig, environment: Environment, model: str, dtype: str
    ) -> None:
        """`model`: the base checkpoint's folder or hub id."""
        super().__init__()
        self._config, self._environment = config, environment
        self._model, self._dtype = model, dtype
        self._folder: Path | None = None
        self._process: ChildProcess | None = None

    @property
    def pid(self) -> int | None:
        """Of the guardian."""
        return None if self._process is None else self._process.pid

    async def launch(self) -> None:
        """Start it, and wait until it answers.  Raises SamplerError, ConfigError."""
        await self.end()
        self._folder = Path(tempfile.mkdtemp(prefix="megatrain-vllm-"))
        socket, key = self._folder / "socket", secrets.token_hex(32)
        line = command(
            self._config, self._environment, self._model, dtype=self._dtype, socket=socket
        )
        self.client = Client("http://vllm", socket=socket, key=key)
        self._process = await ChildProcess.start(
            "vllm", line, variables(self._config, self._environment, key)
        )
        try:
            await self._until_up(self._process)
        except BaseException:
            await self.end()
            raise

    async def _until_up(self, process: ChildProcess) -> None:
        ended = asyncio.ensure_future(process.wait())
        healthy = asyncio.ensure_future(self._until_healthy(START_S))
        try:
            await asyncio.wait([ended, healthy], return_when=asyncio.FIRST_COMPLETED)
            if healthy.done():
                return healthy.result()
            raise SamplerError(
                f"vLLM ended with {ended.result()} at start:\n{process.tail}",
                hint="`megatrain sampler check` tries its environment",
            )
        finally:
            for task in (ended, healthy):
                task.cancel()

    async def lost(self) -> str:
        """Wait until it has ended, or does not answer; return why."""
        assert self._process is not None
        process = self._process
        ended = asyncio.ensure_future(process.wait())
        silent = asyncio.ensure_future(self._silent())
        try:
            await asyncio.wait([ended, silent], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return f"it ended with {ended.result()}"
            await process.end()
            return f"{silent.result()}; it ended with {await process.wait()}"
        finally:
            for task in (ended, silent):
                task.cancel()

    async def end(self) -> None:
        """End the process and all that it started; idempotent."""
        if self._process is not None:
            await self._process.end()
            await self.client.close()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class FoundEngine(_Watched):
    """A server that somebody else has started and ends."""

    pid = None

    def __init__(self, address: str) -> None:
        """`address`: http://HOST:PORT; a key is taken from the variable VLLM_API_KEY."""
        super().__init__()
        self._address, self.base = address, ""

    async def launch(self) -> None:
        """Wait until it answers, and ask what it calls its base.  Raises SamplerError."""
        await self.end()
        self.client = Client(self._address, key=os.environ.get("VLLM_API_KEY"))
        await self._until_healthy(REACH_S)
        models = await self.client.get("/v1/models")
        names = [] if models is None else [m["id"] for m in models["data"] if not m.get("parent")]
        if not names:
            raise SamplerError(f"{self._address} is no vLLM server: it has no /v1/models")
        self.base = names[0]

    async def lost(self) -> str:
        """Wait until it does not answer; return why."""
        return await self._silent()

    async def end(self) -> None:
        """End our connections alone; idempotent."""
        if hasattr(self, "client"):
            await self.client.close()
