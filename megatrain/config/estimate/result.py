"""What a model costs on a mesh: parameters, memory of the ranks, arithmetic, time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.config.estimate.fits import Sizes, check_fits
from megatrain.config.estimate.linears import Mesh, stage_linears
from megatrain.config.estimate.memory import RankMemory, rank_memory
from megatrain.config.estimate.model import ModelShape, read_config
from megatrain.config.estimate.speed import StepTime, find_device, step_time, step_tokens
from megatrain.config.estimate.training import Training
from megatrain.config.estimate.work import Work

RANKS_PER_NODE = 8
"""Devices in a node, where nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Entries of the whole model."""

    total: int
    active: int
    """Matrix weights that one token meets."""
    trained: int
    """Of the model, or of the adapter's factors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The answer; bytes are of one rank, seconds of one step over `tokens_per_step`."""

    shape: ModelShape
    mesh: Mesh
    training: Training
    parameters: Parameters
    ranks: list[RankMemory]
    """One a pipeline stage."""
    tokens_per_step: int
    flops_per_token: float
    """Forward and backward, at this sequence length."""
    time: StepTime | None
    """None without a device."""

    @property
    def peak(self) -> int:
        """Bytes on the fullest rank."""
        return max(rank.peak for rank in self.ranks)

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds of one step."""
        return None if self.time is None else self.time.total

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all ranks together."""
        return None if self.time is None else self.tokens_per_step / self.time.total

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for a file."""
        return {
            "parameters": {
                "total": self.parameters.total,
                "active": self.parameters.active,
                "trained": self.parameters.trained,
            },
            "ranks": [rank.to_dict() for rank in self.ranks],
            "peak": self.peak,
            "tokens_per_step": self.tokens_per_step,
            "flops_per_token": self.flops_per_token,
            "seconds_per_step": self.seconds_per_step,
            "tokens_per_second": self.tokens_per_second,
        }


def estimate(
    config: Mapping[str, Any] | str | Path,
    mesh: Mesh,
    training: Training,
    *,
    device: str | None = None,
    ranks_per_node: int = RANKS_PER_NODE,
) -> Estimate:
    """Estimate memory of every stage and, given a device's name, the time of a step.

    `config` is Hugging Face's config.json as a mapping, its file, or a checkpoint's folder.
    Raises ConfigError (UnknownFamilyError among them) or LayoutError.
    """
    shape = ModelShape.from_config(read_config(config))
    check_fits(_sizes(shape), mesh)
    found = None if device is None else find_device(device)
    overhead = 0 if found is None else found.overhead
    ranks = [
        rank_memory(shape, mesh, training, stage=stage, overhead=overhead)
        for stage in range(mesh.pp)
    ]
    work = Work.of_shape(shape)
    length = training.sequence_length
    flops = work.train_flops([length], is_frozen=training.lora is not None)
    if training.optimizer is None:
        flops = work.forward_flops([length])
    time = None
    if found is not None:
        time = step_time(shape, mesh, training, found, ranks, ranks_per_node)
    return Estimate(
        shape=shape,
        mesh=mesh,
        training=training,
        parameters=_parameters(shape, training, work),
        ranks=ranks,
        tokens_per_step=step_tokens(mesh, training),
        flops_per_token=flops / length,
        time=time,
    )


@dataclass(frozen=True, slots=True)
class _OneRank:
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int = 1


def _parameters(shape: ModelShape, training: Training, work: Work) -> Parameters:
    trained = work.total_parameters
    if training.optimizer is None:
        trained = 0
    elif training.lora is not None:
        alone = _OneRank()
        whole = stage_linears(shape, alone, 0)
        trained = sum(linear.factors(training.lora, alone) for linear in whole)
    return Parameters(total=work.total_parameters, active=work.active_parameters, trained=trained)


def _sizes(shape: ModelShape) -> Sizes:
    experts = shape.experts
    return Sizes(
        heads=shape.heads,
        groups=shape.groups,
        layers=shape.layers,
        widths={"hidden_size": shape.hidden, "intermediate_size": shape.ffn},
        experts=None if experts is None else experts.count,
        expert_width=None if experts is None else experts.ffn,
    )
