"""Training runs and checkpoints, as they are listed."""

from typing import Literal

from megatrain.service.wire.schema.base import Reply, Request, TextMetadata, Time, TtlSeconds


class Cursor(Reply):
    """Which part of a list a page is."""

    offset: int
    limit: int
    total_count: int


class Checkpoint(Reply):
    """One checkpoint."""

    checkpoint_id: str
    """weights/NAME, sampler_weights/NAME or external_weights/NAME."""
    checkpoint_type: Literal["training", "sampler", "external"]
    time: Time
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: TextMetadata | None = None
    expires_at: Time | None = None


class TrainingRun(Reply):
    """One run."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool = False
    lora_rank: int | None = None
    last_request_time: Time
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: TextMetadata | None = None


class TrainingRunsReply(Reply):
    """GET training_runs."""

    training_runs: list[TrainingRun]
    cursor: Cursor


class CheckpointsReply(Reply):
    """GET checkpoints, training_runs/{id}/checkpoints."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class SetTtlRequest(Request):
    """PUT training_runs/{id}/checkpoints/{checkpoint_id}/ttl."""

    ttl_seconds: TtlSeconds | None = None
    """None: it stays."""


class ExternalWeightsUrlsReply(Reply):
    """GET training_runs/{id}/checkpoints/{checkpoint_id}/external_weights_urls."""

    urls: dict[str, str]
    """By file."""
    expires: Time
