"""Sampling sessions and samples."""

import asyncio
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from megatrain.errors import MegatrainError
from megatrain.service.auth.principal import Principal
from megatrain.service.hub import Hub
from megatrain.service.tinker.access import LARGE_BYTES, Json, Reader, Sampler, TheHub
from megatrain.service.tinker.told import told
from megatrain.service.wire.bodies import parse_model, read_body
from megatrain.service.wire.sampling import to_sample_request
from megatrain.service.wire.schema import (
    CreateSamplingSessionReply,
    CreateSamplingSessionRequest,
    FutureReply,
    JoinSamplingSessionReply,
    JoinSamplingSessionRequest,
    SampleBody,
    SamplerReply,
)

router = APIRouter(tags=["sampling"])


@router.post("/create_sampling_session", **told(CreateSamplingSessionReply))
async def create_sampling_session(
    body: CreateSamplingSessionRequest, hub: TheHub, who: Sampler
) -> Json:
    """Begin to sample from a base model, or from saved weights."""
    hub.check_ready()
    session = hub.sessions.alive(who.project, body.session_id)
    state = await hub.open_sampler(
        who.project,
        session.id,
        f"{session.id}:sample:{body.sampling_session_seq_id}",
        body.base_model,
        body.model_path,
    )
    return {"sampling_session_id": state.record.id, "type": "create_sampling_session"}


@router.get("/samplers/{sampler_id}", **told(SamplerReply))
async def get_sampler(sampler_id: str, hub: TheHub, who: Reader) -> Json:
    """Return what a sampling session samples from."""
    _, state = hub.intake.sampler(who.project, sampler_id)
    said: Json = {"sampler_id": sampler_id, "base_model": state.record.base_model}
    if state.record.model_path is not None:
        said["model_path"] = state.record.model_path
    return said


@router.post("/join_sampling_session", **told(JoinSamplingSessionReply))
async def join_sampling_session(
    body: JoinSamplingSessionRequest, hub: TheHub, who: Sampler
) -> Json:
    """Give a clone of a sampling client a number of its own."""
    _, state = hub.intake.sampler(who.project, body.sampling_session_id)
    state.clones += 1
    return {"client_counter": state.clones}


@router.post("/asample", **told(FutureReply))
async def asample(request: Request, hub: TheHub, who: Sampler) -> Any:
    """Draw sequences after a prompt."""
    hub.check_ready()
    raw = await read_body(request, hub.config.limits.max_body_bytes)
    if len(raw) < LARGE_BYTES:
        body = parse_model(SampleBody, raw)
    else:
        body = await asyncio.to_thread(parse_model, SampleBody, raw)
    session = body.sampling_session_id
    if session is None:
        return JSONResponse({"detail": "a sample needs a sampling_session_id"}, 400)
    return await _sample(body, raw, session, hub, who)


async def _sample(body: SampleBody, raw: bytes, session: str, hub: Hub, who: Principal) -> Json:
    deployment, _ = hub.intake.sampler(who.project, session)
    base = deployment.fleet.base
    content: Any
    tokens = 1
    try:
        content = to_sample_request(
            body,
            hub.config.limits,
            vocab_size=base.vocab_size,
            max_context_length=base.max_context_length,
        )
        tokens = len(content.prompt) + content.num_samples * content.max_tokens
    except MegatrainError as error:
        content = error
    seq = uuid.uuid4().int >> 65 if body.seq_id is None else body.seq_id
    ticket = await hub.intake.sample(who, session, seq, content, raw, tokens)
    names = [f"{ticket.id}:{index}" for index in range(max(1, body.num_samples))]
    return {"request_id": ticket.id, "sample_sequence_ids": names}
