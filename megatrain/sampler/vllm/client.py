"""HTTP to one vLLM server: its messages, and its errors as ours."""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from megatrain.errors import ConfigError, DataError, SamplerError

GENERATE = "/inference/v1/generate"
ABORT = "/inference/v1/abort_requests"
ABORT_S = 5.0
"""Seconds for telling the engine that nobody waits any more."""
HEALTH_S = 30.0
"""Seconds in which an engine says that it is alive."""
IDLE_S = 2.0
"""An unused connection is closed after so long: before the server does, after 5 s."""
MAX_SAID = 2000
"""Characters of an engine's answer that an error shows."""


class LostError(SamplerError):
    """The engine did not answer, or said that it is dead."""


class UnknownModelError(SamplerError):
    """The engine does not know the adapter (any more)."""


class Client:
    """One server, at an address or at a socket of this host."""

    def __init__(self, address: str, *, socket: Path | None = None, key: str | None = None) -> None:
        """`key` is sent as a bearer token."""
        self._http = httpx.AsyncClient(
            base_url=address,
            transport=httpx.AsyncHTTPTransport(
                uds=None if socket is None else str(socket),
                limits=httpx.Limits(max_connections=None, keepalive_expiry=IDLE_S),
            ),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(None, connect=10.0),
        )

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()

    async def is_healthy(self) -> bool:
        """Tell whether the engine answers and is not dead."""
        if self._http.is_closed:
            return False
        with contextlib.suppress(httpx.TransportError):
            return (await self._http.get("/health", timeout=HEALTH_S)).status_code == 200
        return False

    async def get(self, path: str) -> dict[str, Any] | None:
        """Return what is at a path; None if nothing is.  Raises SamplerError, ConfigError."""
        try:
            answer = await self._http.get(path, timeout=HEALTH_S)
        except httpx.TransportError as error:
            raise _lost(error) from error
        if answer.status_code == 404:
            return None
        _check(answer.status_code, answer.text)
        found: dict[str, Any] = answer.json()
        return found

    async def tell(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Send a message; return the status and the text of its answer.  Raises LostError."""
        self._check_open()
        try:
            answer = await self._http.post(path, json=body)
        except httpx.TransportError as error:
            raise _lost(error) from error
        return answer.status_code, answer.text

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a generate request; cancelled, the engine stops drawing.

        Raises DataError, ConfigError, UnknownModelError, LostError, SamplerError.
        """
        async with self._aborting(body) as named:
            status, text = await self.tell(GENERATE, named)
        _check(status, text)
        answer: dict[str, Any] = json.loads(text)
        return answer

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Give the messages of a generate request as they come; left early, the engine stops."""
        self._check_open()
        async with self._aborting(body | {"stream": True}) as named:
            try:
                async with self._http.stream("POST", GENERATE, json=named) as answer:
                    if answer.status_code != 200:
                        _check(answer.status_code, (await answer.aread()).decode(errors="replace"))
                    async for line in answer.aiter_lines():
                        if line.startswith("data: ") and line != "data: [DONE]":
                            yield _message(line.removeprefix("data: "))
            except httpx.TransportError as error:
                raise _lost(error) from error

    def _check_open(self) -> None:
        if self._http.is_closed:
            raise LostError("vLLM was ended")

    @contextlib.asynccontextmanager
    async def _aborting(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Give the request a name, by which the engine is told if nobody waits for it any more.

        A closed connection says so too, but not when: an adapter may be deleted only after it.
        """
        name = uuid.uuid4().hex
        try:
            yield body | {"request_id": name}
        except (asyncio.CancelledError, GeneratorExit):
            await asyncio.shield(self._abort(f"generate-tokens-{name}"))
            raise

    async def _abort(self, name: str) -> None:
        if self._http.is_closed:
            return
        with contextlib.suppress(httpx.TransportError):
            await self._http.post(ABORT, json={"request_ids": [name]}, timeout=ABORT_S)


def _message(text: str) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(text)
    if "error" in message:
        _check(int(message["error"].get("code") or 500), text)
    return message


def _lost(error: httpx.TransportError) -> LostError:
    return LostError(f"vLLM does not answer: {type(error).__name__}: {error}")


def _check(status: int, text: str) -> None:
    """Raise what an answer's status means, with what the engine said."""
    if status == 200:
        return
    said = said_in(text)
    if status == 404:
        raise UnknownModelError(f"vLLM does not know the model: {said}")
    if status in (401, 403):
        raise ConfigError(
            f"vLLM refuses us: {said}",
            hint="its key is in the variable VLLM_API_KEY; it is started with --enable-scale-out",
        )
    if 400 <= status < 500:
        raise DataError(f"vLLM refuses the request: {said}")
    if "EngineDead" in text:
        raise LostError(f"vLLM's engine is dead: {said}")
    raise SamplerError(f"vLLM failed ({status}): {said}")


def said_in(text: str) -> str:
    """Return the message in an error's body, however it is wrapped."""
    try:
        body = json.loads(text)
    except ValueError:
        return text.strip()[:MAX_SAID]
    if isinstance(body, dict):
        body = body.get("error", body.get("detail", body))
    if isinstance(body, dict):
        body = body.get("message", body)
    return str(body)[:MAX_SAID]
