"""Whether a saved state is of the base model, adapter and optimizer that are here."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from megatrain.config.lora import LoraSpec
from megatrain.errors import CheckpointError, ConfigError
from megatrain.export.rank_zero import texts_of_all
from megatrain.export.state.collect import fingerprint
from megatrain.export.state.imported import check_imported
from megatrain.export.state.record import StateRecord
from megatrain.model.lora import targets_of
from megatrain.model.network import Network
from megatrain.train.optimizer import OPTIMIZERS
from megatrain.train.optimizer_state import state_keys
from megatrain.train.schedule import SCHEDULES
from megatrain.train.step import BASE, Trained, Trainer

logger = logging.getLogger(__name__)


def check_fits(trainer: Trainer, name: str, record: StateRecord) -> None:
    """Raise unless the state is of this base, adapter and optimizer.  Collective.

    Raises CheckpointError for another base or LoRA options, ConfigError for another optimizer or
    schedule.
    """
    _check_base(trainer.network, record)
    if (name == BASE) != (record.lora is None):
        saved, wanted = (
            "all parameters" if lora is None else "a LoRA adapter"
            for lora in (record.lora, None if name == BASE else record)
        )
        raise CheckpointError(f"the state is of {saved}, but {wanted} is trained here")
    if name in trainer.trained:
        _check_adapter(trainer, name, record)
        _check_choices(trainer.trained[name], record)


def _check_base(network: Network, record: StateRecord) -> None:
    if record.imported is not None:
        check_imported(record.imported, network.table.hf_shapes, network.folder)
    if record.fingerprint is None:
        return
    here = fingerprint(network)
    other = [
        f"{key}: saved {record.fingerprint.get(key)}, here {value}"
        for key, value in here.items()
        if record.fingerprint.get(key) != value
    ]
    if other:
        raise CheckpointError(
            f"the state is of another base model than {network.folder}: {'; '.join(other)}",
            hint=f"it was saved from {record.base_model}",
        )


def _check_adapter(trainer: Trainer, name: str, record: StateRecord) -> None:
    """Compare what the options mean for this base, not their wording.  Collective."""
    if name == BASE or record.lora is None:
        return
    network = trainer.network
    saved, here = LoraSpec.from_any(record.lora), network.adapters[name].spec
    theirs, ours = targets_of(network.table, saved), targets_of(network.table, here)
    other = [
        f"{module}: saved {_said(theirs.get(module))}, here {_said(ours.get(module))}"
        for module in sorted(theirs.keys() | ours.keys())
        if theirs.get(module) != ours.get(module)
    ]
    if other:  # said in the words of the options, too, where those are short
        other[:0] = [
            f"{key}: saved {getattr(saved, key)}, here {getattr(here, key)}"
            for key in ("r", "lora_alpha", "use_rslora")
            if getattr(saved, key) != getattr(here, key)
        ]
    text = "; ".join(other[:3]) + (f"; and {len(other) - 3} more" if len(other) > 3 else "")
    # A pipeline stage knows its own layers, and all ranks go on or none does.
    found = next(filter(None, texts_of_all(text, network.groups)), None)
    if found is not None:
        raise CheckpointError(
            f"adapter {name!r} has other LoRA options than the state: {found}",
            hint="add the adapter with the saved options, or resume without adding it",
        )


def _said(target: tuple[int, float] | None) -> str:
    return "none" if target is None else f"r={target[0]} with a factor of {target[1]:g}"


def _check_choices(trained: Trained, record: StateRecord) -> None:
    pairs: tuple[tuple[str, Any, Any, Mapping[str, Any]], ...] = (
        ("optimizer", trained.optimizer_choice, record.optimizer, OPTIMIZERS),
        ("schedule", trained.schedule_choice, record.schedule, SCHEDULES),
    )
    for what, choice, saved, known in pairs:
        if choice is None or saved is None:
            continue
        kind, options = choice
        if known.get(kind, kind) != known.get(saved.kind, saved.kind):
            raise ConfigError(
                f"the state is of the {what} {saved.kind}, but {kind} is set here",
                hint=f"set {saved.kind}, or none at all: resuming sets it as it was",
            )
        if json.loads(json.dumps(options)) != saved.options:
            logger.info("%s goes on with the options set here: %s", what, options)
    if record.optimizer is None or not record.optimizer.counters or trained.optimizer is None:
        return
    found = {*record.tensors, *record.optimizer.counters}
    for group in range(len(trained.optimizer.param_groups)):
        if lacking := sorted({*state_keys(trained.optimizer, group)} - found):
            raise ConfigError(
                f"the optimizer set here needs {lacking}, which the state has not",
                hint=f"it was saved with {record.optimizer.kind} {record.optimizer.options}",
            )
