"""What is done to a model on one rank, in torch and Megatron; every rank does the same."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatrain.bus.residents import Residents
from megatrain.bus.start_from import imported
from megatrain.checkpoint.locate import locate
from megatrain.config.lora import LoraSpec
from megatrain.config.model import ModelConfig
from megatrain.config.plugins import build
from megatrain.errors import ConfigError, ExportError, StateError
from megatrain.export.gather import gather
from megatrain.export.save import finish_save, save_adapter, save_checkpoint
from megatrain.export.skeleton import Skeleton
from megatrain.export.state.collect import collect
from megatrain.export.state.fits import check_fits
from megatrain.export.state.folder import State
from megatrain.export.state.record import StateRecord, read_record, weights_alone
from megatrain.export.state.restore import open_state, restore
from megatrain.model.network import Network, build_network
from megatrain.model.patch import apply_to_model
from megatrain.parallel.joined import Session
from megatrain.platforms.choose import prepare
from megatrain.train.losses.make import make_loss
from megatrain.train.optimizer import check_optimizer
from megatrain.train.step import BASE, Trainer


def open_model(model_id: str, config: ModelConfig, session: Session) -> Trainer:
    """Load this rank's part of a checkpoint.  Collective."""
    network = build_network(locate(model_id), config, session.groups)
    prepare(session.platform)  # Bridge imports some of Megatron's modules only while it builds
    return Trainer(network, seed=session.seed)


def add_adapter(
    trainer: Trainer,
    name: str,
    spec: LoraSpec,
    *,
    seed: int,
    accumulation_steps: int,
    optimizer: Sequence[Any] | None = None,
) -> None:
    """Inject an adapter that can be trained and later exported.

    Raises ConfigError, before anything has changed, for targets that PEFT could not hold, and for
    an optimizer (kind, options) that is none.
    """
    network = trainer.network
    if BASE in trainer.trained:
        raise StateError(
            "the base itself is being trained; an adapter needs it frozen",
            hint="add adapters before set_optimizer",
        )
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in dir(torch.nn.ModuleDict):
        raise ConfigError(
            f"an adapter's name must be letters, digits, '-' and '_': {name!r}",
            hint="names of torch.nn.ModuleDict's methods will not do either",
        )
    _check_exportable(network, spec)
    if optimizer is not None:
        check_optimizer(optimizer[0], optimizer[1])
    network.add_adapter(name, spec, seed=seed)
    trainer.add(name, accumulation_steps=accumulation_steps)
    if optimizer is not None:
        trainer.set_optimizer(name, optimizer[0], dict(optimizer[1]))


def set_loss(
    trainer: Trainer, name: str, spec: Any, options: dict[str, Any], *, trust: bool
) -> None:
    """Choose an adapter's loss."""
    trainer.set_loss(name, make_loss(spec, options, trust_remote_code=trust))


def apply_patch(trainer: Trainer, spec: Any, options: dict[str, Any], *, trust: bool) -> bool:
    """Apply a user's patch to this rank's part of the model."""
    patch = build("patch", spec, options, trust_remote_code=trust)
    return bool(apply_to_model([patch], trainer.network.chunks))


def _check_exportable(network: Network, spec: LoraSpec) -> None:
    """Ask PEFT's rules about one module of each kind; every rank knows the whole model."""
    kinds = {
        re.sub(r"\d+", "*", module): module
        for module in network.table.all_hf_modules()
        if not spec.is_all_linear and spec.matches(module)
    }
    if not kinds and not network.has_scores:
        return
    config = json.loads((network.folder / "config.json").read_text())
    try:
        skeleton = Skeleton(config, has_score=network.has_scores)
    except ValueError as error:
        raise ConfigError(f"Transformers has no reward model of this family: {error}") from error
    for module in kinds.values():
        try:
            skeleton.place(module)
        except ExportError as error:
            raise ConfigError(
                f"an adapter on {module} could not be exported: {error.message}", hint=error.hint
            ) from error


def state_dict(trainer: Trainer, name: str) -> dict[str, Any] | None:
    """Return an adapter's, or the base's, whole tensors on rank 0, None elsewhere.  Collective."""
    network = trainer.network
    slices = network.base_slices() if name == BASE else network.adapters[name].slices()
    return gather(slices, network.groups)


def save(
    trainer: Trainer,
    name: str,
    directory: Path,
    model_id: str,
    *,
    save_optimizer: bool = False,
    consumed_train_samples: int | None = None,
    background: bool = False,
) -> None:
    """Write an adapter as a PEFT directory, or the base as a checkpoint.  Collective.

    With the optimizer or a data position, a training state goes into its subfolder `state`.
    """
    network = trainer.network
    if name == BASE and directory.resolve() == network.folder.resolve():
        raise ExportError(
            f"the checkpoint that is being trained must not be replaced: {directory}",
            hint="save to another folder",
        )
    state = None
    if save_optimizer or consumed_train_samples is not None:
        collected = collect(
            trainer,
            name,
            base_model=model_id,
            consumed_train_samples=consumed_train_samples,
            with_optimizer=save_optimizer,
        )
        state = State(*collected)
    more: dict[str, Any] = {"folder": network.folder, "state": state, "background": background}
    if name == BASE:
        save_checkpoint(
            directory,
            network.base_slices(),
            network.groups,
            has_score=network.has_scores,
            **more,
        )
    else:
        adapter = network.adapters[name]
        save_adapter(directory, adapter, network.groups, base_model=model_id, **more)


def wait_for_save(trainer: Trainer) -> None:
    """Wait for a save in the background.  Raises ExportError if it failed.  Collective."""
    finish_save(trainer.network.groups)


def resume(
    trainer: Trainer,
    name: str | None,
    checkpoint: Path,
    residents: Residents,
    *,
    use_previous: bool = False,
    with_optimizer: bool = True,
    optimizer: Sequence[Any] | None = None,
) -> tuple[dict[str, Any], str]:
    """Go on from a saved training state.  Collective.

    Returns step and data position, and a digest of what was read.  What is not there yet is made
    as it was saved: adapter, optimizer, schedule.  Without the optimizer, weights alone are taken,
    and `optimizer` (kind, options), or the one that is there, begins anew.
    """
    checkpoint, record = open_state(checkpoint, trainer.network.groups, use_previous=use_previous)
    if not with_optimizer:
        record = weights_alone(record)
    if name is None:
        known = residents.names
        name = record.adapter if record.adapter in known or not known else known[0]
    _restore(trainer, name, checkpoint, record, residents)
    if record.optimizer is None and (optimizer is not None or not with_optimizer):
        _begin_anew(trainer, name, optimizer)
    place = {"cur_step": record.step, "consumed_train_samples": record.consumed_train_samples}
    return place, _digest(record)


def load(
    trainer: Trainer,
    name: str | None,
    place: str,
    residents: Residents,
    *,
    optimizer: Sequence[Any] | None = None,
) -> str:
    """Give an adapter the weights of one in PEFT's format; make it if it is not there.

    `optimizer` (kind, options) begins anew with it.  Returns a digest of what was read.
    """
    with imported(trainer, place) as state:
        record = read_record(state)
        if name is None:
            name = next(iter(residents.names), record.adapter)
        _restore(trainer, name, state, record, residents)
        if optimizer is not None:
            _begin_anew(trainer, name, optimizer)
        return _digest(record)


def _begin_anew(trainer: Trainer, name: str, optimizer: Sequence[Any] | None) -> None:
    """Give an adapter an optimizer without moments: this one, or one as it had."""
    choice = optimizer or trainer.trained[name].optimizer_choice
    if choice is not None:
        trainer.set_optimizer(name, choice[0], dict(choice[1]))


def _digest(record: StateRecord) -> str:
    """Return what tells a state's files from others."""
    files = sorted(f"{name}:{each.sha256}" for name, each in record.files.items())
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def _restore(
    trainer: Trainer, name: str, checkpoint: Path, record: StateRecord, residents: Residents
) -> None:
    if name in residents.names:
        residents.bring([name])
    check_fits(trainer, name, record)
    if name not in trainer.trained:
        if record.lora is None:
            trainer.add(BASE, accumulation_steps=record.accumulation_steps)
        else:
            add_adapter(
                trainer,
                name,
                LoraSpec.from_any(record.lora),
                seed=record.seed,
                accumulation_steps=record.accumulation_steps,
            )
    restore(trainer, name, checkpoint, record)
