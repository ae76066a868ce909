"""Results: asked for by their request's id, held until they are there."""

import time

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from megatrain.errors import NotFoundError
from megatrain.service.tinker.access import Json, Reader, TheHub
from megatrain.service.tinker.told import PROTOBUF, told, told_later
from megatrain.service.wire.schema import (
    CancelFutureRequest,
    Empty,
    FutureRetrieveRequest,
    FuturesRetrieveReply,
    FuturesRetrieveRequest,
)
from megatrain.service.work.ticket import Result, Ticket

router = APIRouter(tags=["futures"])

AT_ONCE_BYTES = 1 << 16
"""A result up to here is sent at once also to who asks for its size first: that saves a request."""


@router.post("/retrieve_future", **told_later())
async def retrieve_future(body: FutureRetrieveRequest, hub: TheHub, who: Reader) -> Response:
    """Return a request's result, or 408 when it is not there in time."""
    try:
        ticket = await hub.futures.get(who.project, body.request_id)
    except NotFoundError as error:
        return JSONResponse({"detail": error.message}, 410)
    result = await hub.futures.wait(ticket, hub.config.times.poll_s)
    if result is None:
        return JSONResponse(_try_again(ticket), 408)
    is_large = result.kind == "proto" and len(result.data) > AT_ONCE_BYTES
    if body.allow_metadata_only and is_large and not result.failed:
        said = {"status": "complete_metadata", "response_payload_size": len(result.data)}
        return JSONResponse(said)
    return as_response(result)


def as_response(result: Result) -> Response:
    """Return a result as HTTP: protobuf for passes and samples, JSON for the rest."""
    media = PROTOBUF if result.kind == "proto" and not result.failed else "application/json"
    return Response(result.data, media_type=media)


def _try_again(ticket: Ticket) -> Json:
    return {"type": "try_again", "request_id": ticket.id, "queue_state": "active"}


@router.post("/retrieve_futures", **told(FuturesRetrieveReply))
async def retrieve_futures(body: FuturesRetrieveRequest, hub: TheHub, who: Reader) -> Json:
    """Return which requests of a sampling session were finished since a cursor."""
    session = body.target.sampling_session_id
    hub.intake.sampler(who.project, session)
    wanted = hub.config.times.poll_s if body.timeout is None else body.timeout
    limit = time.monotonic() + min(wanted, hub.config.times.poll_s)
    cursor = body.prev_cursor or 0
    while True:
        found, end = hub.futures.completions(session, cursor)
        left = limit - time.monotonic()
        if found or left <= 0:
            return {"completions": [each.said() for each in found], "cursor": end}
        await hub.futures.anything(left)


@router.post("/cancel_future", **told(Empty))
async def cancel_future(body: CancelFutureRequest, hub: TheHub, who: Reader) -> Json:
    """Stop a sampling request; a request that is done, or no sample, stays as it is."""
    ticket = await hub.futures.get(who.project, body.request_id)
    if ticket.kind == "sample" and ticket.sampler is not None and ticket.result is None:
        deployment, _ = hub.intake.sampler(who.project, ticket.sampler)
        deployment.sampling.cancel(ticket)
    return {}
