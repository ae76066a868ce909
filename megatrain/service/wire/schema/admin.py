"""Audit log and usage, for administrators."""

from typing import Literal

from pydantic import AwareDatetime, Field, model_validator

from megatrain.service.wire.schema.base import ProjectId, Reply, Request, TextMetadata, Time


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


class UsageQuery(Request):
    """GET billing/usage/events: whole hours of UTC, at most 14 days."""

    starting_on: AwareDatetime
    ending_before: AwareDatetime

    @model_validator(mode="after")
    def _in_order(self) -> "UsageQuery":
        span = self.ending_before - self.starting_on
        if not 0 < span.total_seconds() <= 14 * 24 * 3600:
            raise ValueError("ending_before must be after starting_on by at most 14 days")
        return self


class TrainingUsage(Reply):
    """Tokens of passes."""

    type: Literal["training"] = "training"
    token_count: int


class PrefillUsage(Reply):
    """Tokens of prompts."""

    type: Literal["sampling_prefill"] = "sampling_prefill"
    cached: bool = False
    token_count: int


class SampleUsage(Reply):
    """Tokens that were drawn."""

    type: Literal["sampling_sample"] = "sampling_sample"
    token_count: int


class CheckpointUsage(Reply):
    """Checkpoints that were made."""

    type: Literal["checkpoint"] = "checkpoint"
    count: int


class StorageUsage(Reply):
    """What checkpoints take."""

    type: Literal["storage"] = "storage"
    free: bool = True
    gigabyte_hours: float


class UsageEvent(Reply):
    """What was used in an hour.  This service has no prices: costs are null."""

    bucket_start: Time
    bucket_end: Time
    base_model: str | None = None
    user_id: str | None = None
    user_name: str | None = None
    session_id: str | None = None
    project_id: str | None = None
    estimated_cost_usd: float | None = None
    effective_rate_usd_per_million_tokens: float | None = None
    effective_rate_usd_per_gigabyte_month: float | None = None
    event_info: TrainingUsage | PrefillUsage | SampleUsage | CheckpointUsage | StorageUsage = Field(
        discriminator="type"
    )


class UsageSession(Reply):
    """A session among them."""

    user_metadata: TextMetadata | None = None


class UsageReply(Reply):
    """GET billing/usage/events."""

    data: list[UsageEvent]
    sessions: dict[str, UsageSession] = Field(default_factory=dict)
    cost_data_through: Time | None = None


class StorageQuery(Request):
    """GET billing/usage/checkpoints/current."""

    project_id: ProjectId | None = None


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
