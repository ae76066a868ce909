"""What all models of the wire share: names, bounds, and how they treat what they do not know."""

import math
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_INT = (1 << 63) - 1
MAX_METADATA_BYTES = 64 << 10
_MAX_DEPTH = 16


class Request(BaseModel):
    """A body that clients send.  What a newer client adds is ignored."""

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class Reply(BaseModel):
    """A body that the service sends: what it names and nothing else."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


def _small(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """Refuse metadata that are large or deep."""
    if value is not None and _size(value, 0) > MAX_METADATA_BYTES:
        raise ValueError(f"metadata must be smaller than {MAX_METADATA_BYTES} bytes")
    return value


def _size(value: Any, depth: int) -> int:
    if depth > _MAX_DEPTH:
        raise ValueError(f"metadata must not be nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict):
        return (
            sum(len(key.encode()) + 4 + _size(each, depth + 1) for key, each in value.items()) + 2
        )
    if isinstance(value, list):
        return sum(1 + _size(each, depth + 1) for each in value) + 2
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("metadata must hold finite numbers")
    return len(value.encode()) + 2 if isinstance(value, str) else 8


def _with_zone(value: datetime) -> datetime:
    return value if value.tzinfo else value.replace(tzinfo=UTC)


Time = Annotated[datetime, AfterValidator(_with_zone)]
"""A time with its zone: UTC where none is given."""
SessionId = Annotated[str, Field(min_length=1, max_length=64)]
RunId = Annotated[str, Field(min_length=1, max_length=128)]
SamplerId = Annotated[str, Field(min_length=1, max_length=128)]
RequestId = Annotated[str, Field(min_length=1, max_length=128)]
ProjectId = Annotated[str, Field(min_length=1, max_length=128)]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]
TinkerPath = Annotated[str, Field(max_length=512, pattern=r"^tinker://")]
Slot = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
"""Number of a run, sampler or copy within its session."""
SeqId = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
"""Number of a request within its run."""
TtlSeconds = Annotated[int, Field(ge=3600, le=10 * 366 * 24 * 3600)]
"""One hour to ten years."""
Metadata = Annotated[dict[str, Any], AfterValidator(_small)]
TextMetadata = Annotated[dict[str, str], AfterValidator(_small)]
Token = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]


class Empty(Reply):
    """{}."""
