"""What a project has used: its checkpoints now, its tokens by the hour.  There are no prices."""

from datetime import UTC, datetime, timedelta

from fastapi import APIRouter

from megatrain.errors import DataError
from megatrain.service.store import checkpoints, usage
from megatrain.service.store.records import Used
from megatrain.service.tinker.access import Reader, TheHub
from megatrain.service.tinker.shown import text_metadata, time_of
from megatrain.service.wire.schema import (
    StorageItem,
    StorageReply,
    UsageEvent,
    UsageOfKind,
    UsageReply,
    UsageSession,
)

router = APIRouter(prefix="/billing/usage", tags=["usage"])

HOUR = timedelta(hours=1)
LONGEST = timedelta(days=14)
MAX_EVENTS = 100_000


@router.get("/checkpoints/current", response_model_exclude_none=True)
async def checkpoint_storage(hub: TheHub, who: Reader) -> StorageReply:
    """Return what the checkpoints of the caller's project take now."""
    count, size = await hub.store.read(checkpoints.sizes(who.project))
    item = StorageItem(
        project_id=who.project, checkpoint_count=count, size_bytes=size, size_gigabytes=size / 1e9
    )
    return StorageReply(data=[item])


@router.get("/events")
async def usage_events(
    hub: TheHub, who: Reader, starting_on: datetime, ending_before: datetime
) -> UsageReply:
    """Return tokens by hour, session and kind, of hours from `starting_on` to `ending_before`."""
    start, end = _in_utc(starting_on), _in_utc(ending_before)
    if not timedelta(0) < end - start <= LONGEST:
        raise DataError(
            f"usage is told for some hours, up to {LONGEST.days} days: from {start} to {end}"
        )
    await hub.auth.flush()
    hours = who.project, start.timestamp(), end.timestamp()
    found = await hub.store.read(usage.by_hour(*hours, MAX_EVENTS + 1))
    if len(found) > MAX_EVENTS:
        raise DataError(
            f"there are more than {MAX_EVENTS} events from {start} to {end}",
            hint="ask for fewer hours",
        )
    told = {
        each.id: UsageSession(user_metadata=text_metadata(each.user_metadata))
        for each in await hub.store.read(usage.sessions_by_hour(*hours))
    }
    return UsageReply(data=[_event(each) for each in found], sessions=told)


def _in_utc(when: datetime) -> datetime:
    """Return a full hour in UTC; a time without a zone is meant so.  Raises DataError."""
    try:
        found = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    except OverflowError:
        raise DataError(f"there is no such time in UTC: {when.isoformat()}") from None
    if (found.minute, found.second, found.microsecond) != (0, 0, 0):
        raise DataError(f"usage is counted by full hours, UTC: {when.isoformat()}")
    return found


def _event(used: Used) -> UsageEvent:
    start = time_of(used.hour)
    return UsageEvent(
        bucket_start=start,
        bucket_end=start + HOUR,
        base_model=used.base_model,
        session_id=used.session or None,
        project_id=used.project,
        event_info=UsageOfKind(type=used.kind, token_count=used.tokens),
    )
