"""The run's model with its adapter, loss, optimizer and schedule, by the public API."""

from typing import Any

import megatrain
from megatrain.cli.train.recipes import RECIPES
from megatrain.config.run import RunConfig
from megatrain.train.loss import Loss

ADAPTER = "default"


def build_model(config: RunConfig, loss: Loss, *, steps: int) -> Any:
    """Load the checkpoint and say what is trained, and how.  Collective."""
    options = config.model.model_dump(exclude={"id"})
    task = RECIPES[config.recipe].task
    model = megatrain.MegatronModel(config.model.id, task=task, **options)
    if config.lora_spec is not None:
        model.add_adapter_to_model(ADAPTER, config.lora_spec)
    model.set_optimizer(config.optimizer.name, **config.optimizer.options)
    if config.schedule.name != "none":
        model.set_lr_scheduler(config.schedule.name, **schedule_options(config, steps))
    model.set_loss(loss)
    return model


def schedule_options(config: RunConfig, steps: int) -> dict[str, Any]:
    """Return the schedule's options: warm-up and length, which the run knows, and its own."""
    section = config.schedule
    known: dict[str, Any] = {"num_warmup_steps": round(section.warmup_ratio * steps)}
    if section.name not in WITHOUT_LENGTH:
        known["num_training_steps"] = steps
    return known | section.options


WITHOUT_LENGTH = ("ConstantWarmupScheduler",)
"""Schedules that do not end."""
