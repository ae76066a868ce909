"""Routes of the OpenAI-compatible endpoints, under /v1 and /oai/api/v1."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from megatrain.service.openai.answer import events
from megatrain.service.openai.chat import Chat
from megatrain.service.openai.completions import Completion
from megatrain.service.openai.errors import OpenAIRoute
from megatrain.service.openai.ports import Authenticate, Completer, Model, Target
from megatrain.service.openai.schema import ChatBody, CompletionBody
from megatrain.service.openai.text_model import text_model

Json = dict[str, Any]

PREFIXES = ("/v1", "/oai/api/v1")
CLIENT_GONE = 499
"""Status that nobody reads any more; nginx's, for logs."""


def make_router(completer: Completer, authenticate: Authenticate) -> APIRouter:
    """Return the routes; every one of them asks for a key with the scope `sample`."""
    router = APIRouter(tags=["openai"], route_class=OpenAIRoute)
    for prefix in PREFIXES:
        _add_models(router, prefix, completer, authenticate)
        _add_completions(router, prefix, completer, authenticate)
    return router


def _add_models(
    router: APIRouter, prefix: str, completer: Completer, authenticate: Authenticate
) -> None:
    @router.get(f"{prefix}/models")
    async def models(request: Request) -> Json:
        """List what can be sampled."""
        who = await authenticate(request, "sample")
        return {"object": "list", "data": [_shown(m) for m in await completer.models(who)]}

    @router.get(f"{prefix}/models/{{model:path}}")
    async def model(model: str, request: Request) -> Json:
        """Return one model, by any of its names."""
        who = await authenticate(request, "sample")
        for each in await completer.models(who):
            if each.id == model:
                return _shown(each)
        target = await completer.resolve(who, model)  # a name that is not listed
        return _shown(Model(target.name, 0, who.project))


def _shown(model: Model) -> Json:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": model.owned_by,
    }


def _add_completions(
    router: APIRouter, prefix: str, completer: Completer, authenticate: Authenticate
) -> None:
    @router.post(f"{prefix}/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue prompts."""
        who = await authenticate(request, "sample")
        target = await completer.resolve(who, body.model)
        work = Completion(completer, who, target, body)
        return await _respond(request, work, target, is_stream=bool(body.stream))

    @router.post(f"{prefix}/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a chat."""
        who = await authenticate(request, "sample")
        target = await completer.resolve(who, body.model)
        work = Chat(completer, who, target, body)
        return await _respond(request, work, target, is_stream=bool(body.stream))


async def _respond(
    request: Request, work: Completion | Chat, target: Target, *, is_stream: bool
) -> Response:
    # Long texts take seconds, in which others go on.
    model = await asyncio.to_thread(text_model, target.folder)
    asked: Any = await asyncio.to_thread(work.asked, model)
    if is_stream:
        return _stream(work.chunks(model, asked))
    drawing = asyncio.ensure_future(work.answer(model, asked))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({drawing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if drawing.done():
            return JSONResponse(drawing.result())
        return Response(status_code=CLIENT_GONE)
    finally:
        gone.cancel()
        drawing.cancel()  # what is not done is waited for by nobody


async def _gone(request: Request) -> None:
    """Return when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _stream(chunks: AsyncIterator[Json]) -> StreamingResponse:
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(events(chunks), media_type="text/event-stream", headers=headers)
