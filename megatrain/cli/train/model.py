"""The run's model with its adapter, loss, optimizer and schedule, by the public API."""

import inspect
from typing import Any

import megatrain
from megatrain.cli.train.recipes import RECIPES
from megatrain.config.lora import LoraSpec
from megatrain.config.plugins import build
from megatrain.config.run import RunConfig
from megatrain.errors import ConfigError
from megatrain.train.loss import Loss
from megatrain.train.schedule import SCHEDULES, check_schedule

ADAPTER = "default"


def build_model(config: RunConfig, loss: Loss, *, steps: int) -> Any:
    """Load the checkpoint and say what is trained, and how.  Collective.

    Raises ConfigError for an optimizer, schedule or processor that cannot work before weights are
    read.
    """
    from megatrain.train.optimizer import check_optimizer  # imports Megatron: after initialize

    optimizer, schedule = config.optimizer, config.schedule
    check_optimizer(optimizer.name, optimizer.options)
    schedule_options = complete_schedule(config, steps)
    processor = processor_of(config)
    held = config.model.model_dump(exclude={"id"})
    task = RECIPES[config.recipe].task
    model = megatrain.MegatronModel(config.model.id, task=task, **held)
    if config.train.adapter is not None:
        model.load(config.train.adapter, adapter_name=ADAPTER)
    elif config.lora_spec is not None:
        model.add_adapter_to_model(ADAPTER, config.lora_spec)
    model.set_optimizer(optimizer.name, **optimizer.options)
    if schedule.name != "none":
        model.set_lr_scheduler(schedule.name, **schedule_options)
    model.set_loss(loss)
    if processor is not None:
        model.set_processor(processor)
    return model


def processor_of(config: RunConfig) -> Any:
    """Return what turns rows into model inputs, None for the default.  Raises ConfigError."""
    chosen = config.processor
    if chosen is None:
        return None
    trust = config.data.trust_remote_code
    return build("processor", chosen.name, chosen.options, trust_remote_code=trust)


def adapter_options(config: RunConfig) -> LoraSpec | None:
    """Return the adapter's options, of the file if there is one; None if all is trained.

    Raises CheckpointError, ExportError or ConfigError for a file that cannot be used.
    """
    if config.train.adapter is None:
        return config.lora_spec
    from megatrain.checkpoint.remote import local_source
    from megatrain.export.adapters.peft_file import read_peft

    with local_source(config.train.adapter, is_checkpoint=False) as folder:
        return read_peft(folder).spec


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
