"""What a client asks before it begins: its configuration, and what is served."""

from typing import Annotated, Literal

from pydantic import Field

from megatrain.service.wire.schema.base import Reply, Request, SessionId

_Size = Annotated[int, Field(ge=1, le=1 << 40)]


class ClientConfigRequest(Request):
    """POST client/config, client/dynamic_config."""

    sdk_version: str = Field(default="", max_length=64)


class ClientConfigReply(Reply):
    """Fields that tune the client; defaults are this service's."""

    pjwt_auth_enabled: bool = False
    credential_default_source: str = "api_key"
    sample_dispatch_bytes_semaphore_size: _Size = 10 << 20
    inflight_response_bytes_semaphore_size: _Size = 50 << 20
    parallel_fwdbwd_chunks: bool = True
    proto_compress_fwdbwd: bool = False
    fwdbwd_max_chunk_len: _Size = 1024
    """Data of one request."""
    fwdbwd_max_chunk_bytes_count: _Size = 5_000_000
    """Bytes of one request, about, before compression."""
    fwdbwd_dispatch_bytes_semaphore_size: _Size = 50_000_000
    billing_exception_max_pause_duration_sec: int = Field(default=3600, ge=0, le=1 << 31)
    sample_no_retries: bool = False
    sample_enable_stuck_detection: bool = True
    sample_max_concurrent_requests: int = Field(default=2000, ge=1, le=1 << 20)
    use_pyqwest_transport: bool = True
    sample_use_retrieve_futures: bool = False
    custom_loss_server_side: bool = False
    sample_join_sampling_session: bool = False


class ClientDynamicConfigReply(Reply):
    """Fields that the client asks for again from time to time."""

    refresh_interval_sec: int = Field(default=300, ge=10, le=1 << 31)
    sample_cancel_enabled: bool = False
    sample_cancel_max_batch_size: int = Field(default=64, ge=1, le=1024)


class OrgDetails(Reply):
    """The organization of a key: here, its project."""

    name: str


class UserDetails(Reply):
    """Who a key was made for."""

    email: str


class KeyDetails(Reply):
    """Whose a key is."""

    org_details: OrgDetails
    user_details: UserDetails


class KeyReply(Reply):
    """GET auth/apikey/me."""

    key_id: int
    name: str
    note: str
    details: KeyDetails


class HealthReply(Reply):
    """GET healthz."""

    status: Literal["ok"] = "ok"


class SupportedModel(Reply):
    """One base model."""

    model_name: str
    max_context_length: int | None = None
    trainable: bool = True
    sampleable: bool = True


class CapabilitiesReply(Reply):
    """GET get_server_capabilities."""

    supported_models: list[SupportedModel]


class TelemetryRequest(Request):
    """POST telemetry.  Events are neither looked at nor kept: they may hold keys."""

    session_id: SessionId
    sdk_version: str = Field(default="", max_length=64)


class TelemetryReply(Reply):
    """It was taken."""

    status: Literal["accepted"] = "accepted"
