"""RunConfig: all of one training run, checked before anything is loaded.  No torch."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, InstanceOf, PositiveFloat, model_validator

from megatrain.config.lora import LoraSpec
from megatrain.config.run.sections import (
    DataSection,
    LossSection,
    MeshSection,
    ModelSection,
    Named,
    OptimizerSection,
    ReportSection,
    ScheduleSection,
    Section,
    TrainSection,
)
from megatrain.errors import ConfigError

Recipe = Literal["pt", "sft", "dpo", "kto", "rm", "distill"]


def _lora(value: Any) -> LoraSpec:
    """Take PEFT's fields; without targets, every linear layer is adapted."""
    if not isinstance(value, Mapping):
        return LoraSpec.from_any(value)
    known = [each.name for each in fields(LoraSpec)]
    for key in value:
        near = get_close_matches(key, known, n=1)
        if near and key not in known:
            raise ConfigError(f"unknown key {key!r} in [lora]; did you mean {near[0]!r}?")
    if not {"target_modules", "target_parameters"} & set(value):
        value = {**value, "target_modules": "all-linear"}
    return LoraSpec.from_any(value)


Lora = Annotated[InstanceOf[LoraSpec], BeforeValidator(_lora)]

ONE_ROW_RECIPES = ("pt", "sft")
"""Recipes whose rows are single sequences with nothing beside their labels: they can be packed."""


class RunConfig(Section):
    """Everything that `megatrain train` does, by section."""

    recipe: Recipe
    """pt: plain text; sft: conversations; dpo and rm: pairs; kto: rows with a boolean label;
    distill: conversations with teacher_tokens and teacher_logps."""
    output_dir: str = "output"
    """Where checkpoints, metrics.jsonl and loss.png go."""
    platform: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """What to train on."""
    timeout_s: PositiveFloat = 1800.0
    """Seconds that ranks wait for one another: for the one that encodes the rows, say."""
    full: bool = False
    """Train all parameters instead of a LoRA adapter."""
    model: ModelSection
    """The checkpoint and how it is held."""
    mesh: MeshSection = MeshSection()
    """Parallel layout."""
    lora: Lora | None = None
    """PEFT's options; by default r = 8 on all linear layers."""
    data: DataSection
    """Rows."""
    model_patches: tuple[Named, ...] = ()
    """Named changes to the model, made in this order once it is built, where they apply."""
    processor: Named | None = None
    """Turns rows into model inputs; InputProcessor by default."""
    loss: LossSection = LossSection()
    """Name and options of the loss; by default the recipe's."""
    optimizer: OptimizerSection = OptimizerSection()
    """Name and options of the optimizer."""
    schedule: ScheduleSection = ScheduleSection()
    """Learning rate schedule."""
    train: TrainSection = TrainSection()
    """Loop, evaluation, checkpoints."""
    report: ReportSection = ReportSection()
    """Trackers and hub."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        data, train = self.data, self.train
        if not data.train:
            raise ValueError("data.train must name at least one source: it is empty")
        if self.full and self.lora is not None:
            raise ValueError("full = true trains all parameters: leave [lora] out")
        if train.adapter is not None and (self.full or self.lora is not None):
            raise ValueError(
                "train.adapter brings its own LoRA options: leave [lora] and full = true out"
            )
        if data.packing and self.recipe not in ONE_ROW_RECIPES:
            raise ValueError(
                f"packing is for {' and '.join(ONE_ROW_RECIPES)}: recipe={self.recipe!r}"
            )
        if data.packing and data.streaming:
            raise ValueError("packing needs all lengths: streaming must be false")
        if data.streaming and train.max_steps is None:
            raise ValueError("streaming does not know the number of rows: set train.max_steps")
        weights = [source.weight for source in data.train]
        if any(weights) and not all(weights):
            raise ValueError(f"weights must be given for all training sources or none: {weights}")
        needs_eval = {
            "eval_every": train.eval_every,
            "eval_batch_size": train.eval_batch_size,
            "early_stop": train.early_stop,
        }
        if not data.eval and (asked := [name for name, value in needs_eval.items() if value]):
            raise ValueError(f"train.{asked[0]} needs evaluation data: data.eval is empty")
        if train.early_stop and not train.eval_every:
            raise ValueError(f"early_stop needs train.eval_every: early_stop={train.early_stop}")
        return self

    @property
    def lora_spec(self) -> LoraSpec | None:
        """The adapter's options; None if all parameters are trained."""
        if self.full:
            return None
        return self.lora or LoraSpec(target_modules="all-linear")

    @property
    def num_ranks(self) -> int:
        """Ranks that the mesh asks for; where dp is left open, as few as can be."""
        mesh = self.mesh
        return (mesh.dp or mesh.fsdp) * mesh.tp * mesh.pp * mesh.cp
