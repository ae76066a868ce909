"""Search for sessions."""

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from megatrain.service.wire.schema.base import (
    ProjectId,
    Reply,
    Request,
    SessionId,
    TextMetadata,
    Time,
)

Reason = Literal["success", "errored", "interrupted"]


class SearchOwner(Request):
    """Whose sessions."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[Annotated[str, Field(max_length=256)]] | None = Field(
        default=None, min_length=1, max_length=10
    )


class StatusQuery(Request):
    """In which state."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[Reason] | None = Field(default=None, min_length=1, max_length=3)


class SearchCursor(Request):
    """Where the next page begins: as a reply's next_cursor has it."""

    last_created_at: AwareDatetime
    last_session_id: SessionId


class SessionSearchRequest(Request):
    """POST sessions/search."""

    session_id: SessionId | None = None
    project_ids: list[ProjectId] | None = Field(default=None, max_length=100)
    user_metadata: TextMetadata = Field(default_factory=dict)
    display_name: str | None = Field(default=None, min_length=1, max_length=256)
    owner: SearchOwner = SearchOwner()
    statuses: list[StatusQuery] | None = Field(default=None, min_length=1, max_length=16)
    limit: int = Field(default=50, ge=1, le=200)
    cursor: SearchCursor | None = None


class ActiveStatus(Reply):
    """Its client is there."""

    type: Literal["active"] = "active"


class CancelledStatus(Reply):
    """It was given up."""

    type: Literal["cancelled"] = "cancelled"
    detail: str | None = None


class ReasonReply(Reply):
    """How its client ended it."""

    type: Reason


class FinishedStatus(Reply):
    """Its client ended it."""

    type: Literal["client_finished"] = "client_finished"
    reason: ReasonReply
    detail: str | None = None


class SessionSummary(Reply):
    """One session that was found."""

    session_id: str
    created_at: Time
    owner: str
    project_id: str
    status: ActiveStatus | CancelledStatus | FinishedStatus | None = None
    checkpoints_count: int
    display_name: str | None = None
    user_metadata: TextMetadata | None = None
    checkpoint_storage_bytes: int | None = None


class NextCursor(Reply):
    """Where the next page begins."""

    last_created_at: Time
    last_session_id: str


class SessionSearchReply(Reply):
    """One page, newest first."""

    sessions: list[SessionSummary]
    next_cursor: NextCursor | None = None
