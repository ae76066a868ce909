"""Sessions, and what a client asks first."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from megatrain.errors import NotFoundError
from megatrain.service.store import runs, samplers, sessions
from megatrain.service.tinker.access import Json, Limit, Offset, Reader, TheHub, Trainer
from megatrain.service.tinker.search import search
from megatrain.service.tinker.told import told
from megatrain.service.wire.schema import (
    CapabilitiesReply,
    ClientConfigReply,
    ClientConfigRequest,
    ClientDynamicConfigReply,
    CreateSessionReply,
    CreateSessionRequest,
    Empty,
    FinishSessionRequest,
    HealthReply,
    KeyReply,
    SessionHeartbeatReply,
    SessionHeartbeatRequest,
    SessionReply,
    SessionSearchReply,
    SessionSearchRequest,
    SessionsReply,
    SetProjectRequest,
    TelemetryReply,
    TraceExportReply,
)

router = APIRouter(tags=["service"])


@router.post("/client/config", **told(ClientConfigReply))
async def client_config(body: ClientConfigRequest, hub: TheHub) -> Json:
    """Return how this service wants its clients to be."""
    return ClientConfigReply(**hub.config.client).model_dump()


@router.post("/client/dynamic_config", **told(ClientDynamicConfigReply))
async def dynamic_config(body: ClientConfigRequest, hub: TheHub) -> Json:
    """Return what may change while a client runs: samples can be cancelled."""
    return {"sample_cancel_enabled": True}


@router.get("/healthz", **told(HealthReply))
async def healthz() -> Json:
    """Tell that the service answers."""
    return {"status": "ok"}


@router.get("/get_server_capabilities", **told(CapabilitiesReply))
async def capabilities(hub: TheHub, who: Reader) -> Json:
    """Return the base models that are served."""
    found = [
        {
            "model_name": name,
            "max_context_length": each.fleet.base.max_context_length,
            "trainable": True,
            "sampleable": each.can_sample,
        }
        for name, each in hub.deployments.items()
    ]
    return {"supported_models": found}


@router.post("/create_session", **told(CreateSessionReply))
async def create_session(body: CreateSessionRequest, hub: TheHub, who: Reader) -> Json:
    """Begin a session."""
    session = await hub.sessions.create(who, body.model_dump())
    return {"session_id": session.id, "type": "create_session"}


@router.post("/session_heartbeat", **told(SessionHeartbeatReply))
async def heartbeat(body: SessionHeartbeatRequest, hub: TheHub, who: Reader) -> Any:
    """Note that a client is alive; 410 tells it that its session is over."""
    try:
        await hub.sessions.heartbeat(who.project, body.session_id)
    except NotFoundError as error:
        hub.check_ready()  # what an earlier process has left is not taken up yet
        return JSONResponse({"detail": error.message}, 410)
    return {"type": "session_heartbeat"}


@router.post("/sessions/search", **told(SessionSearchReply))
async def search_sessions(body: SessionSearchRequest, hub: TheHub, who: Reader) -> Json:
    """Return sessions of the caller's project, the newest first."""
    return await search(body, hub, who)


@router.post("/sessions/{session_id}/finish", status_code=204)
async def finish_session(
    session_id: str, body: FinishSessionRequest, hub: TheHub, who: Reader
) -> Response:
    """End a session."""
    reason = body.reason.type
    status = {"success": "finished"}.get(reason, reason)
    await hub.sessions.finish(who.project, session_id, status, body.detail)
    return Response(status_code=204)


@router.get("/sessions", **told(SessionsReply))
async def list_sessions(hub: TheHub, who: Reader, limit: Limit = 20, offset: Offset = 0) -> Json:
    """Return ids of the caller's sessions, the newest first."""
    found = await hub.store.read(sessions.list_page(who.project, limit, offset))
    return {"sessions": [each.id for each in found]}


@router.get("/sessions/{session_id}", **told(SessionReply))
async def get_session(session_id: str, hub: TheHub, who: Reader) -> Json:
    """Return what belongs to a session."""
    record = await hub.store.read(sessions.get(who.project, session_id))
    if record is None:
        raise NotFoundError(f"there is no session {session_id!r}")
    return {
        "training_run_ids": await hub.store.read(runs.ids_of(session_id)),
        "sampler_ids": await hub.store.read(samplers.ids_of(session_id)),
        "user_metadata": record.user_metadata,
        "display_name": record.display_name,
    }


@router.put("/sessions/{session_id}/project", **told(Empty))
async def set_project(session_id: str, body: SetProjectRequest, hub: TheHub, who: Trainer) -> Json:
    """Refuse another project than the key's own: a key belongs to one."""
    await get_session(session_id, hub, who)
    if body.project_id != who.project:
        raise NotFoundError(f"there is no project {body.project_id!r} that this key may use")
    return {}


@router.get("/sessions/{session_id}/trace_export", **told(TraceExportReply))
async def trace_export(session_id: str, hub: TheHub, who: Reader) -> Json:
    """Tell that traces go to the operator's collector, not through this API."""
    await get_session(session_id, hub, who)
    return {"status": "failed", "error": "traces of this service go to its operator's collector"}


@router.post("/telemetry", **told(TelemetryReply))
async def telemetry(hub: TheHub, who: Reader) -> Json:
    """Accept a client's telemetry, and keep nothing of it: it may hold keys."""
    return {"status": "accepted"}


@router.get("/auth/apikey/me", **told(KeyReply))
async def whoami(hub: TheHub, who: Reader) -> Json:
    """Return what the caller's key is called."""
    details = {"org_details": {"name": who.project}, "user_details": {"email": ""}}
    return {"key_id": who.key_id, "name": who.name, "note": "", "details": details}
