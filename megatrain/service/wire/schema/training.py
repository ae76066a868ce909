"""Training runs: created, described, stepped, unloaded."""

from typing import Literal

from pydantic import Field, model_validator

from megatrain.service.wire.schema.base import (
    Metadata,
    ModelName,
    Reply,
    Request,
    RunId,
    SeqId,
    SessionId,
    Slot,
)
from megatrain.service.wire.schema.optimizers import AdamParams, OptimizerConfig, OptimizerParams


class LoraConfig(Request):
    """The adapter of a run."""

    rank: int = Field(default=32, ge=1, le=4096)
    seed: int | None = Field(default=None, ge=-(1 << 63), le=(1 << 64) - 1)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModelRequest(Request):
    """POST create_model."""

    session_id: SessionId
    model_seq_id: Slot
    base_model: ModelName
    user_metadata: Metadata | None = None
    lora_config: LoraConfig | None = None
    """None: all parameters are trained, where the operator allows it."""
    optimizer_config: OptimizerConfig = OptimizerConfig()


class CreateModelReply(Reply):
    """Result of create_model."""

    model_id: str
    type: Literal["create_model"] = "create_model"


class GetInfoRequest(Request):
    """POST get_info."""

    model_id: RunId


class OptimizerReply(Reply):
    """The optimizer of a run or a checkpoint."""

    type: str = "adamw"
    version: int | None = None


class ModelData(Reply):
    """What a client needs of a run's base model."""

    arch: str | None = None
    model_name: str
    tokenizer_id: str | None = None
    """What the client loads the tokenizer from."""


class GetInfoReply(Reply):
    """What get_info answers."""

    type: Literal["get_info"] = "get_info"
    model_data: ModelData
    model_id: str
    is_lora: bool = True
    lora_rank: int | None = None
    model_name: str | None = None
    optimizer_config: OptimizerReply = OptimizerReply()


class OptimStepRequest(Request):
    """POST optim_step."""

    model_id: RunId
    seq_id: SeqId | None = None
    adam_params: AdamParams | None = None
    optimizer_params: OptimizerParams | None = None

    @model_validator(mode="after")
    def _one_family(self) -> "OptimStepRequest":
        if self.adam_params and self.optimizer_params:
            raise ValueError("a step has adam_params or optimizer_params, not both")
        return self


class OptimStepReply(Reply):
    """Result of optim_step."""

    metrics: dict[str, float] | None = None
    type: Literal["optim_step"] = "optim_step"


class UnloadModelRequest(Request):
    """POST unload_model."""

    model_id: RunId
    seq_id: SeqId | None = None


class UnloadModelReply(Reply):
    """Result of unload_model."""

    model_id: str
    type: Literal["unload_model"] = "unload_model"


class CreateCustomLossRequest(Request):
    """POST create_custom_loss, which this service refuses: its graph is not looked at."""

    session_id: SessionId
    custom_loss_seq_id: Slot = 0
    name: str = Field(default="", max_length=256)


class WeightsInfoReply(Reply):
    """POST weights_info."""

    base_model: str
    optimizer_config: OptimizerReply = OptimizerReply()
    is_lora: bool = True
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
