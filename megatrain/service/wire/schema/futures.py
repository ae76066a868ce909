"""Requests whose results come later."""

from typing import Literal

from pydantic import Field

from megatrain.service.wire.schema.base import MAX_INT, Reply, Request, RequestId, SamplerId


class FutureReply(Reply):
    """A request was accepted; retrieve_future has its result."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None
    """Names of the sequences that asample draws."""


class FutureRetrieveRequest(Request):
    """POST retrieve_future."""

    request_id: RequestId
    allow_metadata_only: bool = False


class TryAgainReply(Reply):
    """Not yet: with status 408."""

    type: Literal["try_again"] = "try_again"
    request_id: str
    queue_state: Literal["active", "paused_capacity", "paused_rate_limit"] = "active"
    queue_state_reason: str | None = None


class MetadataReply(Reply):
    """A result is there, of so many bytes; ask again for it."""

    status: Literal["complete_metadata"] = "complete_metadata"
    response_payload_size: int


class FailedReply(Reply):
    """A request failed."""

    error: str
    category: Literal["user", "server", "unknown"]


class FuturesTarget(Request):
    """Whose futures: a sampling session's, of one of its clients."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: SamplerId
    cloned_sampler_id: int = Field(default=0, ge=0, le=MAX_INT)
    """seq_id // 1_000_000_000 of its requests."""


class FuturesRetrieveRequest(Request):
    """POST retrieve_futures."""

    target: FuturesTarget
    prev_cursor: int = Field(default=0, ge=0, le=MAX_INT)
    timeout: float | None = Field(default=None, ge=0, le=3600)
    """Seconds."""
    retrieved_request_ids: list[RequestId] = Field(default=[], max_length=100_000)


class Completion(Reply):
    """A request that is done."""

    state: Literal["finished", "failed"]
    request_id: str
    response_payload_uncompressed_size: int | None = None


class FuturesRetrieveReply(Reply):
    """What is done since the cursor."""

    completions: list[Completion]
    cursor: int


class CancelFutureRequest(Request):
    """POST cancel_future."""

    request_id: RequestId
