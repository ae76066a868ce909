"""The run's model with its adapter, loss, optimizer and schedule, by the public API."""

import inspect
from typing import Any

import megatrain
from megatrain.cli.train.recipes import RECIPES
from megatrain.cli.train.reference import BASE
from megatrain.config.lora import LoraSpec
from megatrain.config.plugins import build, check_options, resolve
from megatrain.config.run import RunConfig
from megatrain.errors import ConfigError
from megatrain.train.loss import Loss
from megatrain.train.schedule import SCHEDULES, check_schedule

ADAPTER = "default"
REFERENCE = "reference"
"""The adapter that training starts from, as it was: it has no optimizer and is never saved."""


def build_model(config: RunConfig, loss: Loss, *, steps: int) -> Any:
    """Load the checkpoint and say what is trained, and how.  Collective.

    Raises ConfigError for a schedule that does not suit so many steps before weights are read.
    """
    optimizer, schedule = config.optimizer, config.schedule
    schedule_options = complete_schedule(config, steps)
    held = config.model.model_dump(exclude={"id"})
    task = RECIPES[config.recipe].task
    model = megatrain.MegatronModel(config.model.id, task=task, **held)
    for name, options in patches_of(config):
        model.apply_patch(name, trust_remote_code=config.data.trust_remote_code, **options)
    _add_adapters(model, config, loss)
    model.set_optimizer(optimizer.name, **optimizer.options)
    if schedule.name != "none":
        model.set_lr_scheduler(schedule.name, **schedule_options)
    model.set_loss(loss)
    _set_processor(model, config, loss)
    return model


def reference_name(config: RunConfig, loss: Loss) -> str:
    """Return what the reference is called where an adapter is named: as in TRL, the adapter that
    training starts from, or else the base.
    """
    starts_from_adapter = config.train.adapter is not None and "ref_logps" in loss.inputs
    return REFERENCE if starts_from_adapter else BASE


def _add_adapters(model: Any, config: RunConfig, loss: Loss) -> None:
    """Give the model what is trained, which is the first adapter, and what it is compared with."""
    if config.train.adapter is not None:
        model.load(config.train.adapter, adapter_name=ADAPTER)
    elif config.lora_spec is not None:
        model.add_adapter_to_model(ADAPTER, config.lora_spec)
    if reference_name(config, loss) == REFERENCE:
        model.load(config.train.adapter, adapter_name=REFERENCE)


def _set_processor(model: Any, config: RunConfig, loss: Loss) -> None:
    processor = processor_of(config)
    if processor is None:
        return
    model.set_processor(processor)
    if reference_name(config, loss) == REFERENCE:
        model.set_processor(processor, adapter_name=REFERENCE)


def patches_of(config: RunConfig) -> list[tuple[str, dict[str, Any]]]:
    """Return names and options of the changes to the model.  Raises ConfigError."""
    trust = config.data.trust_remote_code
    for each in config.model_patches:
        target = resolve("patch", each.name, trust_remote_code=trust)
        check_options(target, each.options, what=f"patch {each.name}")
    return [(each.name, each.options) for each in config.model_patches]


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
