"""Audit log and storage, for administrators."""

from pydantic import Field

from megatrain.service.wire.schema.base import Reply, Time


class AuditEntry(Reply):
    """One thing that somebody did."""

    timestamp: Time
    event: str
    """resource_action."""
    event_details: dict[str, object] = Field(default_factory=dict)
    model_id: str | None = None
    tinker_path: str | None = None
    purpose: str | None = None


class AuditReply(Reply):
    """GET audit."""

    entries: list[AuditEntry]


class StorageItem(Reply):
    """What one owner's checkpoints take now."""

    project_id: str | None = None
    org_user_urn: str | None = None
    user_email: str | None = None
    user_name: str | None = None
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: float | None = None


class StorageReply(Reply):
    """All of them."""

    effective_rate_usd_per_gigabyte_month: float | None = None
    data: list[StorageItem]


class UsageOfKind(Reply):
    """How many tokens, and of what."""

    type: str
    """training, sampling_prefill or sampling_sample."""
    token_count: int
    cached: bool = False


class UsageEvent(Reply):
    """What a session used of one kind in an hour; there are no prices."""

    bucket_start: Time
    bucket_end: Time
    base_model: str
    session_id: str | None
    project_id: str
    event_info: UsageOfKind


class UsageSession(Reply):
    """Whose it was."""

    user_metadata: dict[str, str] | None = None


class UsageReply(Reply):
    """GET billing/usage/events."""

    data: list[UsageEvent]
    sessions: dict[str, UsageSession] = Field(default_factory=dict)
