"""vLLM in a process of its own, as a Sampler.  No torch and no vLLM on this side."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from megatrain.config.service import SamplerConfig
from megatrain.errors import ConfigError, SamplerError
from megatrain.sampler.keeper import Keeper
from megatrain.sampler.types import Piece, SampleRequest, SampleResult, SamplerStatus
from megatrain.sampler.vllm.abilities import Abilities, find_out
from megatrain.sampler.vllm.adapters import Adapter, Adapters
from megatrain.sampler.vllm.answer import piece
from megatrain.sampler.vllm.checkpoint import ends_of, has_tokenizer
from megatrain.sampler.vllm.client import LostError, UnknownModelError
from megatrain.sampler.vllm.draw import Draw
from megatrain.sampler.vllm.engine import Engine, FoundEngine, OwnEngine
from megatrain.sampler.vllm.environment import Environment
from megatrain.sampler.vllm.request import bodies, check

WAIT_S = 600.0
"""Seconds that a request waits for an engine which starts again."""
CONFIRM_S = 60.0
"""Seconds in which the watch notices that an engine which did not answer is gone."""
TRIES = 3
"""Engines, or names of an adapter, that a request is given to, if they are lost meanwhile."""


class VllmSampler:
    """A Sampler whose engine is a vLLM server, ours or one that was found."""

    def __init__(
        self,
        config: SamplerConfig,
        model: Path,
        *,
        is_float32: bool,
        environment: Environment | None,
    ) -> None:
        """`model`: the base checkpoint's folder; `environment`: where vLLM is installed, for an
        engine of our own; None: the one at the configuration's address.  Raises ConfigError."""
        self._config = config
        self._ends, self._reads_texts = ends_of(model), has_tokenizer(model)
        wanted = config.dtype
        dtype = ("float32" if is_float32 else "bfloat16") if wanted == "auto" else wanted
        if config.address is not None:
            self._engine: Engine = FoundEngine(config.address)
        elif environment is not None:
            self._engine = OwnEngine(config, environment, str(model), dtype)
        else:
            raise ConfigError(
                "vLLM is not installed", hint="run `megatrain sampler install`, or name an address"
            )
        self._adapters = Adapters(None if config.address is not None else config.max_lora_rank)
        self._abilities = Abilities()
        self._narrow = asyncio.Semaphore(config.max_batch)
        self._running, self._is_started = 0, False
        self._keeper = Keeper("vllm", self._launch, self._lost, wait_s=WAIT_S)

    async def start(self) -> None:
        """Start the engine, and wait until it answers.  Raises SamplerError, ConfigError."""
        await self._keeper.start()

    async def close(self) -> None:
        """End it; idempotent."""
        await self._keeper.close()
        await self._engine.end()

    async def load_adapter(self, name: str, directory: Path) -> None:
        """Make an adapter known under a new name.  Raises SamplerError, ConfigError."""
        await self._keeper.until_ready()
        await self._told(lambda: self._adapters.add(name, directory, self._engine.client))

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter, once the requests that use it are done.  Raises SamplerError."""
        adapter = await self._adapters.remove(name)
        if adapter is not None and self._keeper.is_ready:
            await self._adapters.unload(adapter, self._engine.client)

    async def sample(self, request: SampleRequest) -> SampleResult:
        """Draw; cancelling stops it.  An engine that is lost meanwhile is replaced, and the request
        given to the next.  Raises DataError, SamplerError."""
        check(request, reads_texts=self._reads_texts)
        async with self._using(request) as adapter:
            return await self._told(lambda: self._sample(request, adapter))

    async def stream(self, request: SampleRequest) -> AsyncIterator[Piece]:
        """Draw, and tell tokens while they come.  Raises DataError, SamplerError."""
        check(request, reads_texts=self._reads_texts)
        async with self._using(request) as adapter:
            for rest in reversed(range(TRIES)):
                has_begun = False
                try:
                    async with contextlib.aclosing(self._pieces(request, adapter)) as pieces:
                        async for each in pieces:
                            has_begun = True
                            yield each
                    return
                except UnknownModelError:
                    if has_begun or not rest:
                        raise

    def status(self) -> SamplerStatus:
        """Return how it is."""
        pid = {} if self._engine.pid is None else {"pid": self._engine.pid}
        return SamplerStatus(
            engine="vllm",
            ready=self._keeper.is_ready,
            adapters=self._adapters.names,
            running=min(self._running, self._config.max_batch),
            waiting=max(0, self._running - self._config.max_batch),
            restarts=self._keeper.restarts,
            error=self._keeper.error,
            more=pid | asdict(self._abilities),
        )

    @contextlib.asynccontextmanager
    async def _using(self, request: SampleRequest) -> AsyncIterator[Adapter | None]:
        """Keep the request's adapter from being unloaded, and count its sequences."""
        async with self._adapters.using(request.adapter) as adapter:
            self._running += request.num_samples
            try:
                yield adapter
            finally:
                self._running -= request.num_samples

    async def _name_of(self, adapter: Adapter | None) -> str:
        """Return the engine's name of the base or of an adapter, loaded if it is not."""
        if adapter is None:
            return self._engine.base
        return await self._adapters.require(adapter, self._engine.client)

    async def _told[T](self, call: Callable[[], Awaitable[T]]) -> T:
        """Return what a call gives, made again if the engine or the adapter's name was lost."""
        for rest in reversed(range(TRIES)):
            await self._keeper.until_ready()
            try:
                return await call()
            except LostError:
                await self._until_noticed()
                if not rest:
                    raise
            except UnknownModelError:
                if not rest:
                    raise
        raise AssertionError("unreachable")

    async def _until_noticed(self) -> None:
        """Wait until the watch has seen that the engine is gone, or it turns out that it is not."""
        client = self._engine.client
        limit = asyncio.get_running_loop().time() + CONFIRM_S
        while self._keeper.is_ready and asyncio.get_running_loop().time() < limit:
            self._engine.suspect()
            if self._engine.client is not client or await client.is_healthy():
                return
            await asyncio.sleep(0.05)

    async def _sample(self, request: SampleRequest, adapter: Adapter | None) -> SampleResult:
        name = await self._name_of(adapter)
        draw = Draw(
            self._engine.client,
            name,
            self._abilities,
            ends=self._ends,
            most=self._config.max_batch,
            narrow=self._narrow,
        )
        with self._forgetting(adapter, name):
            return await draw.sample(request)

    async def _pieces(
        self, request: SampleRequest, adapter: Adapter | None
    ) -> AsyncGenerator[Piece]:
        name = await self._told(lambda: self._name_of(adapter))
        count = request.num_samples if request.temperature == 0 else 1
        most = self._config.max_batch
        with self._forgetting(adapter, name):
            for first, body in bodies(request, name, eos=self._ends, most=most):
                async with contextlib.aclosing(self._engine.client.stream(body)) as messages:
                    async for message in messages:
                        for choice in message["choices"]:
                            told = piece(choice, first, request.topk_sample_logprobs)
                            for index in range(count):  # greedy sequences are alike
                                yield replace(told, index=told.index + index)

    @contextlib.contextmanager
    def _forgetting(self, adapter: Adapter | None, name: str) -> Iterator[None]:
        """Note that the engine has lost an adapter, if that is what comes out."""
        try:
            yield
        except UnknownModelError:
            if adapter is not None:
                self._adapters.forgotten(adapter, name)
            raise

    async def _launch(self) -> None:
        try:
            await self._engine.launch()
            self._abilities = await find_out(self._engine.client, self._engine.base)
            await self._adapters.restore(self._engine.client)
        except BaseException as error:
            await self._engine.end()
            if isinstance(error, ConfigError) and self._is_started:
                # The watch goes on: somebody may mend it.
                raise SamplerError(error.message, hint=error.hint) from error
            raise
        self._is_started = True

    async def _lost(self) -> str:
        return await self._engine.lost()
