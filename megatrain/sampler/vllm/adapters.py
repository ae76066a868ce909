"""Adapters by our names, and what the engine calls them now.

The engine is given a new name each time it loads an adapter, never the same one again: what it has
cached under a name stays true.  An adapter that it has forgotten is loaded again when it is used.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from megatrain.errors import ConfigError, DataError, SamplerError
from megatrain.sampler.vllm.adapter_files import is_stacked
from megatrain.sampler.vllm.client import Client, LostError, said_in

logger = logging.getLogger(__name__)

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@dataclass(slots=True, eq=False)
class Adapter:
    """One adapter that callers may name."""

    name: str
    directory: Path
    is_stacked: bool
    """Whether factors of all experts are in one tensor."""
    engine_name: str | None = None
    """None: the engine does not have it."""
    users: int = 0
    """Requests that use it."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)


class Adapters:
    """All adapters of one sampler."""

    def __init__(self, max_rank: int | None) -> None:
        """`max_rank`: what the engine was started for; None: unknown."""
        self._max_rank = max_rank
        self._known: dict[str, Adapter] = {}
        self._idle = asyncio.Condition()

    @property
    def names(self) -> list[str]:
        """What callers may name, sorted."""
        return sorted(self._known)

    async def add(self, name: str, directory: Path, client: Client) -> None:
        """Load an adapter under a new name.  Raises SamplerError, ConfigError."""
        if name in self._known:
            raise ConfigError(f"an adapter is called {name!r} already")
        stacked = await asyncio.to_thread(is_stacked, name, directory, max_rank=self._max_rank)
        adapter = Adapter(name, directory.absolute(), stacked)
        await self.require(adapter, client)
        self._known[name] = adapter

    async def remove(self, name: str) -> Adapter | None:
        """Forget an adapter, once nobody uses it; return it if it was known."""
        async with self._idle:
            await self._idle.wait_for(
                lambda: name not in self._known or not self._known[name].users
            )
            return self._known.pop(name, None)

    async def unload(self, adapter: Adapter, client: Client) -> None:
        """Let the engine forget an adapter that was removed.  Raises SamplerError."""
        async with adapter.loading:
            if adapter.engine_name is None:
                return
            # An engine that starts again learns of the adapters that are left.
            with contextlib.suppress(LostError):
                status, text = await client.tell(UNLOAD, {"lora_name": adapter.engine_name})
                if status not in (HTTPStatus.OK, HTTPStatus.NOT_FOUND):
                    raise SamplerError(
                        f"vLLM did not unload adapter {adapter.name!r}: {said_in(text)}"
                    )

    @contextlib.asynccontextmanager
    async def using(self, name: str | None) -> AsyncIterator[Adapter | None]:
        """Keep an adapter from going while a request uses it; None is the base.

        Raises DataError for a name that is not known.
        """
        if name is None:
            yield None
            return
        if (adapter := self._known.get(name)) is None:
            raise DataError(f"the sampler has no adapter {name!r}")
        adapter.users += 1
        try:
            yield adapter
        finally:
            adapter.users -= 1
            if not adapter.users:
                async with self._idle:
                    self._idle.notify_all()

    async def require(self, adapter: Adapter, client: Client) -> str:
        """Return what the engine calls an adapter, loaded first if it is not.

        Raises ConfigError for one that it cannot load, LostError.
        """
        async with adapter.loading:
            if adapter.engine_name is None:
                adapter.engine_name = await self._load(adapter, client)
            return adapter.engine_name

    async def _load(self, adapter: Adapter, client: Client) -> str:
        name = f"{adapter.name}~{secrets.token_hex(4)}"
        body: dict[str, str | bool] = {"lora_name": name, "lora_path": str(adapter.directory)}
        if adapter.is_stacked:
            body |= {"is_3d_lora_weight": True}
        status, text = await client.tell(LOAD, body)
        if status == HTTPStatus.OK:
            return name
        if "EngineDead" in text or not await client.is_healthy():
            raise LostError(f"vLLM was lost: {said_in(text)}")
        raise ConfigError(f"vLLM cannot load adapter {adapter.name!r}: {said_in(text)}")

    def forgotten(self, adapter: Adapter, engine_name: str) -> None:
        """Note that the engine does not know this name (any more)."""
        if adapter.engine_name == engine_name:
            adapter.engine_name = None

    async def restore(self, client: Client) -> None:
        """Load all adapters into an engine that has started anew.

        One that it cannot load now is tried again when it is used, so that whoever uses it hears.
        """
        adapters = list(self._known.values())
        for adapter in adapters:
            adapter.engine_name = None
        for adapter in adapters:
            if self._known.get(adapter.name) is not adapter:
                continue  # it went meanwhile
            try:
                await self.require(adapter, client)
            except ConfigError as error:
                logger.warning("%s", error.message)
