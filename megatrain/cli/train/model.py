"""The run's model with its adapter, loss, optimizer and schedule, by the public API."""

import inspect
from typing import Any

import megatrain
from megatrain.cli.train.recipes import RECIPES
from megatrain.config.run import RunConfig
from megatrain.errors import ConfigError
from megatrain.train.loss import Loss
from megatrain.train.schedule import SCHEDULES, check_schedule

ADAPTER = "default"


def build_model(config: RunConfig, loss: Loss, *, steps: int) -> Any:
    """Load the checkpoint and say what is trained, and how.  Collective.

    Raises ConfigError for an optimizer or schedule that cannot work before weights are read.
    """
    from megatrain.train.optimizer import check_optimizer  # imports Megatron: after initialize

    optimizer, schedule = config.optimizer, config.schedule
    check_optimizer(optimizer.name, optimizer.options)
    schedule_options = complete_schedule(config, steps)
    options = config.model.model_dump(exclude={"id"})
    task = RECIPES[config.recipe].task
    model = megatrain.MegatronModel(config.model.id, task=task, **options)
    if config.lora_spec is not None:
        model.add_adapter_to_model(ADAPTER, config.lora_spec)
    model.set_optimizer(optimizer.name, **optimizer.options)
    if schedule.name != "none":
        model.set_lr_scheduler(schedule.name, **schedule_options)
    model.set_loss(loss)
    return model


def complete_schedule(config: RunConfig, steps: int) -> dict[str, Any]:
    """Return the schedule's options: its own, and warm-up and length, which follow from the run.

    Raises ConfigError for options that it does not take.
    """
    section = config.schedule
    if section.name == "none":
        if section.warmup_ratio or section.options:
            raise ConfigError("schedule.name = 'none' takes no other keys in [schedule]")
        return {}
    warmup, length = ("num_warmup_steps", "num_training_steps")
    if section.name == "default":
        warmup, length = ("lr_warmup_steps", "lr_decay_steps")
        taken = {warmup, length}
    else:
        function = SCHEDULES.get(section.name)
        taken = set(inspect.signature(function).parameters) if function else set()
    known = {length: steps} if length in taken else {}
    if section.warmup_ratio or warmup in taken:
        known[warmup] = round(section.warmup_ratio * steps)
    options = known | section.options
    check_schedule(section.name, options, lr=config.optimizer.lr)
    return options
