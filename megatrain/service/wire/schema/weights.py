"""Weights of runs: saved, loaded, copied."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatrain.service.wire.schema.base import (
    Metadata,
    ModelName,
    ProjectId,
    Reply,
    Request,
    RunId,
    SeqId,
    SessionId,
    Slot,
    TextMetadata,
    TinkerPath,
    TtlSeconds,
)
from megatrain.service.wire.schema.optimizers import OptimizerConfig

CheckpointName = Annotated[str, Field(min_length=1, max_length=256)]
"""The last part of a checkpoint's path; which names will do is checked where files are kept."""
_AccessToken = Annotated[str, Field(max_length=4096)]


class SaveWeightsRequest(Request):
    """POST save_weights: for training to go on from."""

    model_id: RunId
    path: CheckpointName | None = None
    """Name of the checkpoint; None: one is made up."""
    seq_id: SeqId | None = None
    ttl_seconds: TtlSeconds | None = None
    """None: it stays."""
    overwrite: bool = False
    user_metadata: TextMetadata | None = None


class SaveWeightsForSamplerRequest(Request):
    """POST save_weights_for_sampler: a named checkpoint, or a sampler right away."""

    model_id: RunId
    path: CheckpointName | None = None
    sampling_session_seq_id: Slot | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    seq_id: SeqId | None = None
    ttl_seconds: TtlSeconds | None = None
    user_metadata: TextMetadata | None = None

    @model_validator(mode="after")
    def _named_or_not(self) -> "SaveWeightsForSamplerRequest":
        if self.path is not None and self.sampling_session_seq_id is not None:
            raise ValueError("path and sampling_session_seq_id exclude each other")
        return self


class SaveWeightsExternalRequest(Request):
    """POST save_weights_external: for other programs."""

    model_id: RunId
    path: CheckpointName
    seq_id: SeqId | None = None
    ttl_seconds: TtlSeconds | None = None
    age_encryption_recipients: list[Annotated[str, Field(max_length=1024)]] | None = Field(
        default=None, max_length=16
    )


class SaveWeightsReply(Reply):
    """Result of save_weights."""

    path: str
    type: Literal["save_weights"] = "save_weights"


class SaveWeightsForSamplerReply(Reply):
    """Result of save_weights_for_sampler."""

    path: str | None = None
    sampling_session_id: str | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveWeightsExternalReply(Reply):
    """Result of save_weights_external."""

    path: str
    size_bytes: int | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class LoadWeightsRequest(Request):
    """POST load_weights: into a run that is there, or as the first request of a new one."""

    model_id: RunId | None = None
    seq_id: SeqId | None = None
    session_id: SessionId | None = None
    model_seq_id: Slot | None = None
    base_model: ModelName | None = None
    user_metadata: Metadata | None = None
    path: TinkerPath
    optimizer: bool = False
    """Whether the optimizer's state is loaded too."""
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: _AccessToken | None = None

    @model_validator(mode="after")
    def _one_address(self) -> "LoadWeightsRequest":
        new = self.session_id is not None and self.model_seq_id is not None
        if (self.session_id is None) != (self.model_seq_id is None):
            raise ValueError("session_id and model_seq_id come together")
        if new == (self.model_id is not None):
            raise ValueError("give either model_id, or session_id with model_seq_id")
        return self


class LoadWeightsReply(Reply):
    """Result of load_weights."""

    path: str | None = None
    model_id: str | None = None
    type: Literal["load_weights"] = "load_weights"


class CopyWeightsRequest(Request):
    """POST copy_weights."""

    source_path: TinkerPath
    destination_project_id: ProjectId | None = None
    session_id: SessionId | None = None
    model_seq_id: Slot | None = None
    ttl_seconds: TtlSeconds | None = None
    weights_access_token: _AccessToken | None = None

    @model_validator(mode="after")
    def _one_destination(self) -> "CopyWeightsRequest":
        new = self.session_id is not None and self.model_seq_id is not None
        if (self.session_id is None) != (self.model_seq_id is None):
            raise ValueError("session_id and model_seq_id come together")
        if new == (self.destination_project_id is not None):
            raise ValueError("give either destination_project_id, or session_id with model_seq_id")
        return self


class CopyWeightsReply(Reply):
    """Result of copy_weights."""

    tinker_path: str


class WeightsInfoRequest(Request):
    """POST weights_info."""

    tinker_path: TinkerPath
