"""Transformers and PEFT in a process of their own, as a Sampler.  No torch on this side."""

import asyncio
import contextlib
import itertools
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

from megatrain import errors
from megatrain.config.service import SamplerConfig
from megatrain.errors import ConfigError, DataError, MegatrainError, SamplerError
from megatrain.sampler.codec import pack_request, unpack_piece, unpack_result
from megatrain.sampler.frames import TOKEN_VARIABLE, pack, read
from megatrain.sampler.keeper import Keeper
from megatrain.sampler.process import ChildProcess
from megatrain.sampler.types import Piece, SampleRequest, SampleResult, SamplerStatus

START_S = 600.0
"""Seconds that an engine gets to load."""
TRIES = 3
"""Engines that a request is given to, if they are lost while it is drawn."""


class LostError(SamplerError):
    """The engine was lost before it had answered."""


class TransformersSampler:
    """A Sampler whose engine is Transformers' models with PEFT's adapters."""

    def __init__(self, config: SamplerConfig, model: Path | str, *, is_float32: bool) -> None:
        """`model`: the base checkpoint's folder or hub id."""
        self._config, self._model = config, str(model)
        wanted = config.dtype
        self._dtype = ("float32" if is_float32 else "bfloat16") if wanted == "auto" else wanted
        self._folder: Path | None = None
        self._process: ChildProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[str] | None = None
        self._answers: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._adapters: dict[str, Path] = {}
        self._users: dict[str, int] = {}
        self._idle = asyncio.Condition()
        self._numbers = itertools.count(1)
        self._running = 0
        self._keeper = Keeper("transformers", self._launch, self._lost, wait_s=START_S)

    async def start(self) -> None:
        """Start the engine, and wait until it answers.  Raises SamplerError."""
        await self._keeper.start()

    async def close(self) -> None:
        """End it; idempotent."""
        await self._keeper.close()
        await self._end()

    async def load_adapter(self, name: str, directory: Path) -> None:
        """Make an adapter known under a new name.  Raises SamplerError, ConfigError."""
        if name in self._adapters:
            raise ConfigError(f"an adapter is called {name!r} already")
        await self._keeper.until_ready()
        await self._tell({"op": "load", "name": name, "folder": str(directory)})
        self._adapters[name] = directory

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter, once the requests that use it are done."""
        async with self._idle:
            await self._idle.wait_for(lambda: not self._users.get(name))
        if self._adapters.pop(name, None) is not None and self._keeper.is_ready:
            # An engine that starts again learns of the adapters that are left.
            with contextlib.suppress(LostError):
                await self._tell({"op": "unload", "name": name})

    async def sample(self, request: SampleRequest) -> SampleResult:
        """Draw; cancelling stops it.  An engine that is lost meanwhile is replaced, and the request
        given to the next.  Raises DataError, SamplerError."""
        async with self._using(request):
            for rest in reversed(range(TRIES)):
                await self._keeper.until_ready()
                try:
                    answer = await self._tell({"op": "sample", "request": pack_request(request)})
                except LostError:
                    if not rest:
                        raise
                    await asyncio.sleep(0)
                else:
                    return unpack_result(answer["result"])
        raise AssertionError("unreachable")

    async def stream(self, request: SampleRequest) -> AsyncIterator[Piece]:
        """Draw, and tell tokens while they come.  Raises DataError, SamplerError."""
        async with self._using(request):
            await self._keeper.until_ready()
            message = {"op": "stream", "request": pack_request(request)}
            async with contextlib.aclosing(self._answers_of(message)) as answers:
                async for answer in answers:
                    for piece in answer.get("pieces", ()):
                        yield unpack_piece(piece)

    def status(self) -> SamplerStatus:
        """Return how it is."""
        return SamplerStatus(
            engine="transformers",
            ready=self._keeper.is_ready,
            adapters=sorted(self._adapters),
            running=min(self._running, self._config.max_batch),
            waiting=max(0, self._running - self._config.max_batch),
            restarts=self._keeper.restarts,
            error=self._keeper.error,
            more={} if self._process is None else {"pid": self._process.pid},
        )

    @contextlib.asynccontextmanager
    async def _using(self, request: SampleRequest) -> AsyncIterator[None]:
        """Keep the request's adapter from being unloaded, and count its sequences."""
        name = request.adapter
        if name is not None and name not in self._adapters:
            raise DataError(f"the sampler has no adapter {name!r}")
        self._running += request.num_samples
        self._users[name or ""] = self._users.get(name or "", 0) + 1
        try:
            yield
        finally:
            self._running -= request.num_samples
            self._users[name or ""] -= 1
            if not self._users[name or ""]:
                del self._users[name or ""]
                async with self._idle:
                    self._idle.notify_all()

    async def _launch(self) -> None:
        await self._end()
        self._folder = Path(tempfile.mkdtemp(prefix="megatrain-sampler-"))
        socket, token = self._folder / "socket", secrets.token_hex(32)
        environment = {TOKEN_VARIABLE: token}
        if self._config.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device_list(self._config.devices)
        self._process = await ChildProcess.start("sampler", self._command(socket), environment)
        try:
            reader = await self._connect(socket, token)
            self._reading = asyncio.create_task(self._read(reader))
            for name, folder in list(self._adapters.items()):
                await self._tell({"op": "load", "name": name, "folder": str(folder)})
        except BaseException:
            await self._end()
            raise

    def _command(self, socket: Path) -> list[str]:
        options = {
            "socket": socket,
            "model": self._model,
            "dtype": self._dtype,
            "max-adapters": self._config.max_adapters,
            "max-batch": self._config.max_batch,
        }
        module = "megatrain.sampler.transformers_server"
        pairs = (part for key, value in options.items() for part in (f"--{key}", str(value)))
        return [sys.executable, "-m", module, *pairs]

    async def _connect(self, socket: Path, token: str) -> asyncio.StreamReader:
        process = self._process
        assert process is not None
        limit = asyncio.get_running_loop().time() + START_S
        while not socket.exists():
            if not process.is_running:
                status = await process.wait()
                raise SamplerError(f"the engine ended with {status} at start:\n{process.tail}")
            if asyncio.get_running_loop().time() > limit:
                raise SamplerError(f"the engine did not answer within {START_S:g} s")
            await asyncio.sleep(0.02)
        reader, self._writer = await asyncio.open_unix_connection(str(socket))
        self._writer.write(pack({"token": token}))
        try:
            await read(reader)
        except asyncio.IncompleteReadError as error:
            raise SamplerError("the engine did not accept the connection") from error
        return reader

    async def _read(self, reader: asyncio.StreamReader) -> str:
        """Hand answers on until the engine is gone; return why."""
        reason = "the connection ended"
        try:
            while True:
                answer = await read(reader)
                if (queue := self._answers.get(answer["id"])) is not None:
                    queue.put_nowait(answer)
        except SamplerError as error:
            reason = error.message
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._keeper.note_lost(reason)
            for queue in self._answers.values():
                queue.put_nowait({"lost": reason})
        return reason

    async def _lost(self) -> str:
        assert self._reading is not None
        assert self._process is not None
        reason = await asyncio.shield(self._reading)
        await self._process.end()
        return f"{reason}; it ended with {await self._process.wait()}"

    async def _end(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._process is not None:
            await self._process.end()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _tell(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message; return the last answer."""
        async with contextlib.aclosing(self._answers_of(message)) as answers:
            return [answer async for answer in answers][-1]

    async def _answers_of(self, message: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Send a message; give its answers.  Left early, it is cancelled.  Raises LostError, and
        what the engine raised."""
        number = next(self._numbers)
        queue = self._answers[number] = asyncio.Queue()
        over = False
        try:
            await self._send({"id": number} | message)
            while not over:
                answer = await queue.get()
                over = "pieces" not in answer
                if "lost" in answer:
                    raise LostError(f"the engine was lost: {answer['lost']}")
                if "error" in answer:
                    raise _error(*answer["error"])
                yield answer
        finally:
            del self._answers[number]
            if not over and self._writer is not None and not self._writer.is_closing():
                self._writer.write(pack({"id": 0, "op": "cancel", "of": number}))

    async def _send(self, message: dict[str, Any]) -> None:
        frame = pack(message)
        gone = self._reading is None or self._reading.done()
        if gone or self._writer is None or self._writer.is_closing():
            raise LostError("the engine is not there")
        self._writer.write(frame)
        try:
            await self._writer.drain()
        except ConnectionError as error:
            raise LostError(f"the engine was lost: {error}") from error


def device_list(devices: str) -> str:
    """Return `4-6,8` as `4,5,6,8`.  Raises ConfigError."""
    found: list[int] = []
    try:
        for part in devices.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ConfigError(f"devices are numbers such as 4-7 or 4,5: {devices!r}") from None
    return ",".join(map(str, found))


def _error(kind: str, message: str, hint: str | None) -> MegatrainError:
    found = getattr(errors, kind, SamplerError)
    made: MegatrainError = found(message, hint=hint)
    return made
