"""The part of the API that needs torch and Megatron: a model whose ranks run the user's script."""

from pathlib import Path
from typing import Any

from megatrain.api.session import Session
from megatrain.checkpoint.locate import locate
from megatrain.config.model import ModelConfig
from megatrain.export.gather import gather
from megatrain.export.save import save_adapter, save_checkpoint
from megatrain.model.base import base_slices
from megatrain.model.network import build_network
from megatrain.platforms.choose import prepare
from megatrain.train.step import BASE, Trainer


def open_model(model_id: str, config: ModelConfig, session: Session) -> Trainer:
    """Load this rank's part of a checkpoint.  Collective."""
    network = build_network(locate(model_id), config, session.groups)
    prepare(session.platform)  # Bridge imports some of Megatron's modules only while it builds
    return Trainer(network)


def state_dict(trainer: Trainer, name: str) -> dict[str, Any] | None:
    """Return an adapter's, or the base's, whole tensors on rank 0, None elsewhere.  Collective."""
    network = trainer.network
    slices = base_slices(network.table) if name == BASE else network.adapters[name].slices()
    return gather(slices, network.groups)


def save(trainer: Trainer, name: str, directory: Path, model_id: str) -> None:
    """Write an adapter as a PEFT directory, or the base as a checkpoint.  Collective."""
    network = trainer.network
    if name == BASE:
        save_checkpoint(directory, network.table, network.groups, folder=network.folder)
    else:
        save_adapter(
            directory,
            network.adapters[name],
            network.groups,
            base_model=model_id,
            folder=network.folder,
        )
