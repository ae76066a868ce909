"""Optimizers: chosen when a run is created, with options for each step."""

from typing import Annotated

from pydantic import ConfigDict, Field

from megatrain.service.wire.schema.base import Request

_Rate = Annotated[float, Field(ge=0, le=1e6)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
_Norm = Annotated[float, Field(ge=-1e30, le=1e30)]


class OptimizerConfig(Request):
    """The family of a run's optimizer; the service knows adamw and dimuon."""

    type: str = Field(default="adamw", max_length=64)
    version: int = Field(default=1, ge=0, le=1000)


class AdamParams(Request):
    """AdamW of one step."""

    learning_rate: _Rate = 1e-4
    beta1: _Decay = 0.9
    beta2: _Decay = 0.95
    eps: float = Field(default=1e-12, ge=0, le=1)
    weight_decay: _Rate = 0.0
    """Decoupled."""
    grad_clip_norm: _Norm = 0.0
    """Greatest norm of all gradients together; 0 and below: no clipping."""


class OptimizerParams(Request):
    """Another family's options of one step; it says which."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(max_length=64)
    learning_rate: _Rate = 1e-4
    grad_clip_norm: _Norm = 0.0
    beta1: _Decay = 0.9
