"""Sessions: begun, kept alive, ended, listed."""

from typing import Annotated, Literal

from pydantic import Field

from megatrain.service.wire.schema.base import (
    Metadata,
    ProjectId,
    Reply,
    Request,
    SessionId,
    TextMetadata,
)

DisplayName = Annotated[str, Field(max_length=256)]


class CreateSessionRequest(Request):
    """POST create_session."""

    tags: list[Annotated[str, Field(max_length=256)]] = Field(default=[], max_length=64)
    user_metadata: Metadata | None = None
    sdk_version: str = Field(default="", max_length=64)
    project_id: ProjectId | None = None
    display_name: DisplayName | None = None


class CreateSessionReply(Reply):
    """The session; messages are shown to the user."""

    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None
    type: Literal["create_session"] = "create_session"


class SessionHeartbeatRequest(Request):
    """POST session_heartbeat."""

    session_id: SessionId


class SessionHeartbeatReply(Reply):
    """The session lives."""

    type: Literal["session_heartbeat"] = "session_heartbeat"


class FinishReason(Request):
    """Why a client ended its session."""

    type: Literal["success", "errored", "interrupted"] = "success"


class FinishSessionRequest(Request):
    """POST sessions/{id}/finish."""

    reason: FinishReason = FinishReason()
    detail: str | None = Field(default=None, max_length=4096)


class SessionsReply(Reply):
    """GET sessions: ids."""

    sessions: list[str]


class SessionReply(Reply):
    """GET sessions/{id}."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: TextMetadata | None = None
    display_name: str | None = None


class SetProjectRequest(Request):
    """PUT sessions/{id}/project."""

    project_id: ProjectId


class TraceExportReply(Reply):
    """GET sessions/{id}/trace_export."""

    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None
