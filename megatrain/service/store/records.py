"""Rows of the database as frozen values.  Times are seconds since 1970, UTC."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """Who owns things."""

    id: str
    name: str
    created: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key, without itself."""

    id: int = 0
    project: str
    name: str
    hash: str
    """SHA-256 of the key, in hexadecimal."""
    prefix: str
    """How it begins, to tell it from others."""
    scopes: tuple[str, ...]
    created: float
    expires: float | None = None
    revoked: float | None = None
    last_used: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A client's session."""

    id: str
    project: str
    key_id: int
    tags: tuple[str, ...] = ()
    user_metadata: dict[str, Any] = field(default_factory=dict)
    display_name: str | None = None
    sdk_version: str = ""
    created: float
    last_seen: float
    status: str = "active"
    """active, finished, errored, interrupted or expired."""
    detail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A model that is trained."""

    id: str
    session: str
    project: str
    base_model: str
    adapter: str
    """Its name on the ranks."""
    is_lora: bool
    lora_rank: int
    lora: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    user_metadata: dict[str, Any] = field(default_factory=dict)
    created: float
    last_request: float
    next_seq: int = 0
    """One more than the greatest number that is finished."""
    step: int = 0
    state: str = "creating"
    """creating, live, released or failed."""
    source: str | None = None
    """Path of the checkpoint that it began with."""
    corrupted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that was acknowledged."""

    id: str
    project: str
    key_id: int
    session: str
    run: str | None = None
    sampler: str | None = None
    kind: str
    seq: int = 0
    idem: str
    """The same for a request that comes again."""
    payload: bytes
    state: str = "queued"
    """queued, done, failed or cancelled."""
    result: bytes | None = None
    result_type: str = "json"
    created: float
    finished: float | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSession:
    """What a sampling client samples from."""

    id: str
    session: str
    project: str
    base_model: str
    model_path: str | None = None
    run: str | None = None
    version: int | None = None
    """Step of the run."""
    directory: str | None = None
    """Where the weights are."""
    kind: str = "base"
    """base, named, snapshot or inflight."""
    created: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Saved weights."""

    path: str
    """tinker://run/weights/name."""
    run: str
    project: str
    kind: str
    """training, sampler or external."""
    name: str
    created: float
    size_bytes: int = 0
    public: bool = False
    user_metadata: dict[str, Any] = field(default_factory=dict)
    expires: float | None = None
    base_model: str
    lora: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    location: str
    """Where its files are kept."""
    state: str = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """Something that a key did."""

    time: float
    project: str
    key_id: int
    action: str
    object: str
    address: str = ""
    outcome: str = "ok"


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a run's curve."""

    run: str
    step: int
    time: float
    name: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """Tokens of one kind that a session has used in an hour."""

    hour: int
    """When it began, in seconds since 1970."""
    project: str
    session: str
    """Empty for requests without one."""
    base_model: str
    kind: str
    """training, sampling_prefill or sampling_sample."""
    tokens: int
