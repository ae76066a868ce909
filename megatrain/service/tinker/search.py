"""The search for sessions."""

from datetime import datetime
from typing import Any

from megatrain.service.auth.principal import Principal
from megatrain.service.hub import Hub
from megatrain.service.store import checkpoints, sessions
from megatrain.service.store.records import Session
from megatrain.service.tinker.shown import text_metadata, time_of
from megatrain.service.wire.schema import SessionSearchRequest

_STATUSES = {
    "active": ("active",),
    "cancelled": ("expired",),
    "failed": (),
    "client_finished": ("finished", "errored", "interrupted"),
}
"""Of the API: ours."""


async def search(body: SessionSearchRequest, hub: Hub, who: Principal) -> dict[str, Any]:
    """Return sessions of the caller's project, the newest first."""
    asked = body.model_dump()
    before = None
    if (cursor := asked.get("cursor")) is not None:
        created = cursor["last_created_at"]
        when = created.timestamp() if isinstance(created, datetime) else float(created)
        before = (when, cursor["last_session_id"])
    wanted = [ours for each in asked.get("statuses") or () for ours in _STATUSES[each["type"]]]
    limit = asked.get("limit") or 50
    found = await hub.store.read(
        sessions.search(
            who.project,
            session_id=asked.get("session_id"),
            display_name=asked.get("display_name"),
            statuses=wanted or None,
            before=before,
            limit=limit + 1,
        )
    )
    sizes = [
        await hub.store.read(checkpoints.sizes(who.project, session=each.id))
        for each in found[:limit]
    ]
    shown = [_shown(*each) for each in zip(found[:limit], sizes, strict=True)]
    said: dict[str, Any] = {"sessions": shown}
    if len(found) > limit:
        last = found[limit - 1]
        said["next_cursor"] = {
            "last_created_at": time_of(last.created).isoformat(),
            "last_session_id": last.id,
        }
    return said


def _shown(session: Session, sizes: tuple[int, int]) -> dict[str, Any]:
    metadata = text_metadata(session.user_metadata)
    return {
        "session_id": session.id,
        "created_at": time_of(session.created).isoformat(),
        "owner": session.project,
        "project_id": session.project,
        "checkpoints_count": sizes[0],
        "checkpoint_storage_bytes": sizes[1],
        **({"display_name": session.display_name} if session.display_name else {}),
        **({"user_metadata": metadata} if metadata else {}),
    }
